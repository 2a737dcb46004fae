"""Small random vision checkpoints of real architectures, with image processors, and folders of random pictures."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, PreTrainedModel

IMAGE_SIZE = 16
CLASSES = ("cat", "dog", "ship", "truck", "frog", "bird")
_COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 60,
           "image_size": IMAGE_SIZE, "patch_size": 4}  # fmt: skip
_SWIN = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 2, "image_size": IMAGE_SIZE,
         "patch_size": 2, "drop_path_rate": 0.0}  # fmt: skip
# Model type, class, settings.
_SETTINGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("vit", "ViTForImageClassification", _COMMON),
    "vit-bare": ("vit", "ViTModel", _COMMON),
    "deit": ("deit", "DeiTForImageClassification", _COMMON),
    "deit-teacher": ("deit", "DeiTForImageClassificationWithTeacher", _COMMON),
    "dinov2": ("dinov2", "Dinov2ForImageClassification", _COMMON),
    "dinov2-bare": ("dinov2", "Dinov2Model", _COMMON),
    "beit": ("beit", "BeitForImageClassification", {**_COMMON, "use_relative_position_bias": True}),
    "swin": ("swin", "SwinForImageClassification", _SWIN),
    "swin-bare": ("swin", "SwinModel", _SWIN),
    "clip": ("clip_vision_model", "CLIPVisionModel", _COMMON),
    "clip-classes": (
        "clip",
        "CLIPForImageClassification",
        {"vision_config": _COMMON, "text_config": {**_COMMON, "vocab_size": 32, "bos_token_id": 0, "eos_token_id": 1}},
    ),
    "clip-projection": ("clip_vision_model", "CLIPVisionModelWithProjection", {**_COMMON, "projection_dim": 24}),
    "siglip": ("siglip_vision_model", "SiglipVisionModel", _COMMON),
}
VISION_FAMILIES = tuple(_SETTINGS)


def tiny_vision_model(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model in evaluation mode; no weight, bias or norm keeps its constant initial value."""
    import transformers

    model_type, class_name, settings = _SETTINGS[family]
    labels = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
    config = AutoConfig.for_model(model_type, **{**settings, **labels, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, class_name)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.7 / parameter[0].numel() ** 0.5)
                else:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.config.architectures = [class_name]
    return model.eval()


def write_processor(folder: Path, size: int = IMAGE_SIZE, channels: int = 3) -> None:
    """The settings of an image processor that resizes and scales."""
    settings = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": size, "width": size},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * channels,
        "image_std": [0.25] * channels,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def save_tiny_vision(family: str, folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Write a random checkpoint with its image processor to `folder` and return it."""
    model = tiny_vision_model(family, seed=seed, **changes)
    model.save_pretrained(folder)
    write_processor(folder, channels=getattr(model.config, "num_channels", 3))
    return folder


def save_pictures(folder: Path, count: int, *, layout: str = "flat", seed: int = 0, mode: str = "RGB") -> Path:
    """Write random pictures and return the folder: `flat` without labels, `folders` by class, or `table` next to it."""
    random = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        name = CLASSES[number % len(CLASSES)]
        target = folder / name if layout == "folders" else folder
        target.mkdir(parents=True, exist_ok=True)
        coarse = random.integers(0, 256, (4, 5, len(mode)), dtype=np.uint8).squeeze()
        file = target / f"{number:03}.png"
        Image.fromarray(coarse).resize((20, 18)).save(file)
        rows.append({"file": f"{folder.name}/{file.name}", "label": CLASSES.index(name), "name": name})
    if layout == "table":
        with folder.with_name(f"{folder.name}_labels.csv").open("w", newline="") as table:
            writer = csv.DictWriter(table, ("file", "label", "name"))
            writer.writeheader()
            writer.writerows(rows)
    return folder
