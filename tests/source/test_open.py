"""The properties of an opened source."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import FAMILIES, VOCAB_SIZE, save_tiny, tiny_model
from transformers import AutoModelForCausalLM

from shiftadd_cli.errors import SourceError
from shiftadd_cli.source import open_source


@pytest.mark.parametrize("sharded", [False, True])
def test_sizes_and_names(sharded: bool, tmp_path: Path) -> None:
    folder = save_tiny("qwen2", tmp_path / "my-model", sharded=sharded)
    source = open_source(str(folder))
    unique = sum(parameter.numel() for parameter in tiny_model("qwen2").parameters())
    assert source.model_bytes == 4 * unique
    assert source.file_bytes == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert (source.name, source.spec) == ("my-model", str(folder))
    assert source.skeleton() is source.skeleton()


def test_opening_reads_no_weights(tmp_path: Path) -> None:
    """Opening works on a file whose numbers are all garbage, and leaves every tensor on meta."""
    folder = save_tiny("llama", tmp_path)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    file.write_bytes(content[:start] + b"\xff" * (len(content) - start))
    model = open_source(str(folder)).skeleton()
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize(
    ("requested", "expected"), [("auto", torch.float16), ("float32", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_source_has_the_requested_dtype(requested: str, expected: torch.dtype, tmp_path: Path) -> None:
    source = open_source(str(save_tiny("llama", tmp_path, dtype=torch.float16)), dtype=requested)
    assert source.dtype == source.config.dtype == expected
    source.materialise(["model.layers.0"])
    weight = source.skeleton().get_parameter("model.layers.0.mlp.up_proj.weight")
    stored = load_file(tmp_path / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(weight, stored.to(expected))


def test_weights_give_the_dtype_if_the_config_has_none(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path, dtype=torch.bfloat16)
    config = folder / "config.json"
    lines = [line for line in config.read_text().splitlines() if '"dtype"' not in line]
    config.write_text("\n".join(lines))
    assert open_source(str(folder)).dtype == torch.bfloat16


def test_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no dtype 'int8'.*use auto, float32, float16, bfloat16"):
        open_source(str(tmp_path), dtype="int8")


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_model_matches_transformers(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path, dtype=torch.bfloat16)
    source = open_source(str(tmp_path))
    tokens = torch.arange(VOCAB_SIZE).reshape(4, -1)
    for dtype in (None, torch.float32):
        model = source.load_model(dtype)
        reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype or torch.bfloat16)
        assert not model.training
        assert model.dtype == reference.dtype
        assert torch.equal(model(tokens).logits, reference(tokens).logits)
    assert all(parameter.is_meta for parameter in source.skeleton().parameters())


def test_same_files_at_another_dtype_are_a_separate_source(tmp_path: Path) -> None:
    source = open_source(str(save_tiny("qwen2", tmp_path, dtype=torch.bfloat16)))
    twin = source.at(torch.float32)
    twin.materialise([""])
    assert (source.dtype, twin.dtype) == (torch.bfloat16, torch.float32)
    assert twin.fingerprint == source.fingerprint
    assert all(parameter.is_meta for parameter in source.skeleton().parameters())
    expected = source.load_model(torch.float32).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in twin.skeleton().state_dict().items())
