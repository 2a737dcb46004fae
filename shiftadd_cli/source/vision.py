"""Telling vision models from language models, and finding the class that loads one."""

from __future__ import annotations

from typing import Any

from shiftadd_cli.errors import SourceError

IMAGE_INPUT = "pixel_values"


def vision_class(config: Any, name: str) -> Any | None:
    """The transformers class that loads `config` as a vision model, or None for what reads no images alone.

    The class named in the configuration, if it classifies images or projects their features; else the bare model, which
    is all that is left of one for another task (masked images, segmentation). `name` is for messages.

    Raises:
        SourceError: it reads images and texts, and is no language model.
    """
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        MODEL_MAPPING,
    )

    bare = _listed(MODEL_MAPPING, config)
    classifiers = _listed(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, config)
    named = [getattr(transformers, each, None) for each in getattr(config, "architectures", None) or ()]
    for each in named:
        if each is not None and (each in classifiers or each in bare or each.__name__.endswith("WithProjection")):
            found = each
            break
    else:
        if not bare:
            return None
        found = bare[0]
    reads = _modalities(found)
    if reads == {"image"}:
        return found
    if (
        reads == {"image", "text"}
        and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
        and "vision_config" in (config.sub_configs or {})
    ):
        towers = _listed(MODEL_MAPPING, config.vision_config)
        tower = towers[0].__name__ if towers else "its vision model's class"
        raise SourceError(
            f"{name} is {found.__name__}, which reads images and texts, and only its vision tower can be compressed; "
            f"save that by itself first, in Python: {tower}.from_pretrained({name!r}).save_pretrained(NEW_FOLDER), "
            "with preprocessor_config.json beside it."
        )
    return None


def is_classifier(model: Any) -> bool:
    """Whether a vision model, or its class, gives class scores."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    found = model if isinstance(model, type) else type(model)
    listed = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values()
    return any(found.__name__ in ((each,) if isinstance(each, str) else each) for each in listed)


def _listed(mapping: Any, config: Any) -> list[Any]:
    if type(config) not in mapping:
        return []
    found = mapping[type(config)]
    return list(found) if isinstance(found, (list, tuple)) else [found]


def _modalities(model_class: Any) -> set[str]:
    found = model_class.input_modalities
    if found == "text" and model_class.main_input_name == IMAGE_INPUT:
        # Text is what classes are said to read that say nothing themselves (Cvt, FocalNet).
        return {"image"}
    return {found} if isinstance(found, str) else set(found)
