"""Damaged checkpoints are refused by name on loading, and never filled with random values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from artifacts import COMMON, edit_tensors, write_checkpoint
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


SCALES = "model.decoder.layers.0.fc1.weight_row_scale"


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_scales_that_are_not_finite_are_named(folder: Path, value: float) -> None:
    scales = load_file(folder / "model.safetensors")[SCALES].clone()
    scales[-1] = value
    edit_tensors(folder, {SCALES: scales})
    with pytest.raises(ArtifactError, match=f"{SCALES} holds values that are not finite"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_table_whose_scales_are_not_finite_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tiny_model("llama"), tmp_path / "out", shard_bytes=10**9, tables=True).folder
    name = "model.embed_tokens.weight_int8_scale"
    edit_tensors(folder, {name: torch.full_like(load_file(folder / "model.safetensors")[name], torch.nan)})
    with pytest.raises(ArtifactError, match=f"{name} holds values that are not finite"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("ids", [[40, 41], [-1, 3], [3, 3], [5, 4], [0, 2**31 - 1]])
def test_outlier_columns_that_are_not_there_are_never_read(tmp_path: Path, ids: list[int]) -> None:
    common = COMMON.replaced(outlier_columns=0.05)
    folder = write_checkpoint(tiny_model("opt"), tmp_path / "out", shard_bytes=10**9, common=common).folder
    name = "model.decoder.layers.0.fc1.weight_column_ids"
    assert load_file(folder / "model.safetensors")[name].shape == (len(ids),)
    edit_tensors(folder, {name: torch.tensor(ids, dtype=torch.int32)})
    with pytest.raises(ArtifactError, match=f"{name} names columns that are not there"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tiny_model("opt"), tmp_path / "out").folder
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = min(index["weight_map"].values())
    (folder / file).rename(tmp_path / file)
    index["weight_map"] = {
        name: f"../{file}" if where == file else where for name, where in index["weight_map"].items()
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match="outside its folder"):
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
