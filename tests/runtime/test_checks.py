"""Damaged checkpoints are refused by name on loading, and never filled with random values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from artifacts import edit_tensors, write_checkpoint
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from shiftadd_cli.errors import ArtifactError
from shiftadd_cli.runtime.transformers_plugin import register

register()
CODES = "model.decoder.layers.0.fc1.weight_codes"
SCALE = "model.decoder.layers.1.self_attn.q_proj.weight_row_scale"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tiny_model("opt"), tmp_path / "out", shard_bytes=10**9).folder


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (CODES, None, f"lacks the tensor {CODES}"),
        (SCALE, None, f"lacks the tensor {SCALE}"),
        ("model.decoder.layers.0.fc1.bias", None, r"lacks the tensor model\.decoder\.layers\.0\.fc1\.bias"),
        ("model.decoder.final_layer_norm.weight", None, r"lacks the tensor model\.decoder\.final_layer_norm\.weight"),
        (CODES, torch.zeros(92, 3, 6, dtype=torch.uint8), rf"{CODES} .* \[92, 3, 6\], and .* \[92, 3, 5\]"),
        (CODES, torch.zeros(92, 3, 5), f"{CODES} .* is torch.float32, and the format says torch.uint8"),
        (SCALE, torch.ones(40), f"{SCALE} .* is torch.float32, and the format says torch.bfloat16"),
        ("model.decoder.final_layer_norm.weight", torch.ones(41), r"final_layer_norm\.weight .* \[41\]"),
    ],
)
def test_lacking_and_ill_shaped_tensors_are_named(
    folder: Path, name: str, value: torch.Tensor | None, said: str
) -> None:
    edit_tensors(folder, {name: value})
    with pytest.raises(ArtifactError, match=said):
        AutoModelForCausalLM.from_pretrained(folder)


def test_truncated_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"model\.safetensors is truncated or damaged"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match="no safetensors file"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_names_without_the_prefix_of_the_body_still_load(folder: Path) -> None:
    """transformers adds or removes `model.` on loading; the checks must not mistake that for a lack."""
    path = folder / "model.safetensors"
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    tensors = {name.removeprefix("model."): each.clone() for name, each in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    found = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
