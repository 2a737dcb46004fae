"""Distinguishes vision models from language models and finds the class that loads one."""

from __future__ import annotations

from typing import Any

from shiftadd_cli.errors import SourceError

IMAGE_INPUT = "pixel_values"


def vision_class(config: Any, name: str) -> Any | None:
    """The transformers class that loads `config` as a vision model; None if the model does not read only images.

    This is the class named in the configuration if it classifies images or projects their features. Otherwise it is the
    bare model, without the head of another task (masked images, segmentation). `name` is for messages.

    Raises:
        SourceError: the model reads images and texts and is not a language model.
    """
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        MODEL_MAPPING,
    )

    bare = _listed(MODEL_MAPPING, config)
    classifiers = _listed(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, config)
    named = [getattr(transformers, key, None) for key in getattr(config, "architectures", None) or ()]
    for kind in named:
        if kind is not None and (kind in classifiers or kind in bare or kind.__name__.endswith("WithProjection")):
            chosen = kind
            break
    else:
        if not bare:
            return None
        chosen = bare[0]
    reads = _modalities(chosen)
    if reads == {"image"}:
        return chosen
    if (
        reads == {"image", "text"}
        and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
        and "vision_config" in (config.sub_configs or {})
    ):
        towers = _listed(MODEL_MAPPING, config.vision_config)
        tower = towers[0].__name__ if towers else "its vision model's class"
        raise SourceError(
            f"{name} is {chosen.__name__}, which reads images and texts, and only its vision tower can be compressed; "
            f"save that by itself first, in Python: {tower}.from_pretrained({name!r}).save_pretrained(NEW_FOLDER), "
            "with preprocessor_config.json beside it."
        )
    return None


def is_classifier(model: Any) -> bool:
    """Whether a vision model, or its class, outputs class scores."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    kind = model if isinstance(model, type) else type(model)
    listed = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values()
    return any(kind.__name__ in ((names,) if isinstance(names, str) else names) for names in listed)


def _listed(mapping: Any, config: Any) -> list[Any]:
    if type(config) not in mapping:
        return []
    entry = mapping[type(config)]
    return list(entry) if isinstance(entry, (list, tuple)) else [entry]


def _modalities(model_class: Any) -> set[str]:
    modalities = model_class.input_modalities
    if modalities == "text" and model_class.main_input_name == IMAGE_INPUT:
        # Text is the default for classes that do not state their input (Cvt, FocalNet).
        return {"image"}
    return {modalities} if isinstance(modalities, str) else set(modalities)
