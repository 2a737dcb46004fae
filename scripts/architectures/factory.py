"""Random models of every class in the mappings of transformers, with the other files of a model folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from architectures.exceptions import EXCEPTIONS, PROCESSORS
from architectures.shrinking import IMAGE_SIZE, LABELS, SPECIAL, small_settings

# A larger model would take more than seconds to check.
MOST_WEIGHTS = 3_000_000


@dataclass(frozen=True)
class Architecture:
    """A class of transformers and the type of its configuration."""

    name: str
    model_type: str
    reads_images: bool


def architectures() -> Iterator[Architecture]:
    """Every class of the two mappings once, sorted by name, language models first."""
    from transformers.models.auto import modeling_auto

    for reads_images, mapping in (
        (False, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        (True, modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
    ):
        types: dict[str, list[str]] = {}
        for model_type, names in mapping.items():
            for name in (names,) if isinstance(names, str) else names:
                types.setdefault(name, []).append(model_type)
        for name in sorted(types, key=str.lower):
            yield Architecture(name, _own_type(name, types[name]), reads_images)


def _own_type(name: str, types: list[str]) -> str:
    """The model type that the class is written for, among those that share the class."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if len(types) == 1:
        return types[0]
    own = getattr(transformers, name).config_class
    return next((model_type for model_type in types if CONFIG_MAPPING[model_type] is own), types[0])


def small_config(architecture: Architecture) -> Any:
    """A small configuration for the class. Exceptions of transformers propagate."""
    import transformers

    # A model for pictures and text has a text-only class, which is built from a part of its configuration.
    config_class = getattr(transformers, architecture.name).config_class
    config = config_class(**small_settings(config_class, EXCEPTIONS))
    if architecture.reads_images:
        config.num_labels = LABELS
    return config


def build(architecture: Architecture, seed: int = 0) -> Any:
    """A random model in evaluation mode; no weight, bias or norm keeps its constant initial value."""
    import transformers

    model_class = getattr(transformers, architecture.name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = small_config(architecture)
        with torch.device("meta"):
            size = sum(weight.numel() for weight in model_class(config).parameters())
        if size > MOST_WEIGHTS:
            raise ValueError(f"the smallest configuration has {size:,} weights")
        torch.manual_seed(seed)
        model = model_class(small_config(architecture)).float()
        randomise(model)
    model.config.architectures = [architecture.name]
    return model.eval()


def randomise(model: Any) -> None:
    """Make matrices whose outputs are about as large as their inputs, and vectors close to their constants.

    The padding row of an embedding is zero, as training leaves it: some classes set it to zero on every load.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 3:
                parameter.normal_(std=0.7 / parameter[0].numel() ** 0.5)
            elif parameter.ndim > 1:
                parameter.normal_(std=0.7 / parameter.shape[-1] ** 0.5)
            elif parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0
        stored = model.state_dict().keys()
        for name, buffer in model.named_buffers():
            if name in stored and buffer.is_floating_point():
                # Some buffers are variances, so no value may become negative.
                buffer.add_(torch.randn_like(buffer).abs(), alpha=0.1)


def save(architecture: Architecture, folder: Path, seed: int = 0) -> Path:
    """Write a random checkpoint with its tokenizer, or its image processor, to `folder` and return it."""
    model = build(architecture, seed)
    model.save_pretrained(folder)
    if architecture.reads_images:
        _write_image_processor(architecture, model.config, folder)
    else:
        byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer() -> Any:
    """A tokenizer with an entry for every byte, after 64 special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>"] + [f"<extra_{number}>" for number in range(SPECIAL - 3)]
    entries = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({entry: number for number, entry in enumerate(entries)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def _write_image_processor(architecture: Architecture, config: Any, folder: Path) -> None:
    size = image_size(config)
    settings = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": size, "width": size},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3,
        "image_std": [0.25] * 3,
    }  # fmt: skip
    settings.update(PROCESSORS.get(architecture.model_type, {}))
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def image_size(config: Any) -> int:
    """Height and width of a model's input pictures."""
    size = getattr(config, "image_size", None) or getattr(getattr(config, "vision_config", None), "image_size", None)
    if isinstance(size, (list, tuple)):
        size = size[0]
    return int(size or IMAGE_SIZE)
