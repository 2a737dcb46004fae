"""The tensors that a checkpoint must hold for a model, judged from headers alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, save_tiny
from transformers import AutoConfig, AutoModelForCausalLM

from shiftadd_cli.errors import SourceError
from shiftadd_cli.source import open_source


def _rewrite(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    stored = load_file(folder / "model.safetensors")
    for name, value in change.items():
        assert name in stored or value is not None
        stored.pop(name, None)
        if value is not None:
            stored[name] = value
    save_file(stored, folder / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_any_missing_tensor_is_named(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path)
    name = sorted(load_file(tmp_path / "model.safetensors"))[-1]
    _rewrite(tmp_path, {name: None})
    with pytest.raises(SourceError, match=r"lacks [12] of the tensors \w+ needs \(first: ") as caught:
        open_source(str(tmp_path))
    assert name in str(caught.value) or "lm_head.weight" in str(caught.value) or "embed" in str(caught.value)


def test_wrong_shape_is_named_with_the_expected_one(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    _rewrite(tmp_path, {"model.layers.1.mlp.up_proj.weight": torch.zeros(100, 40)})
    with pytest.raises(SourceError, match=r"up_proj\.weight of .* has shape \[100, 40\], .* \[100, 48\]"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_packed_weights_without_a_config_entry_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    _rewrite(tmp_path, {"model.layers.0.mlp.up_proj.weight": torch.zeros(100, 48).to(dtype)})
    with pytest.raises(SourceError, match="already quantized; give the original"):
        open_source(str(tmp_path))


def test_unknown_tensors_are_ignored(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    _rewrite(tmp_path, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(6), "extra": torch.zeros(1)})
    source = open_source(str(tmp_path))
    source.materialise([""])
    assert not any(parameter.is_meta for parameter in source.skeleton().parameters())


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64, torch.bool])
def test_integer_weights_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    _rewrite(tmp_path, {"model.layers.0.mlp.up_proj.weight": torch.zeros(100, 48).to(dtype)})
    with pytest.raises(SourceError, match=r"up_proj\.weight of .* already quantized; give the original"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.int32])
def test_quantized_weights_among_fused_tensors_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "mixtral", vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    _rewrite(tmp_path, {name: stored[name].to(dtype), f"{name}_scale": torch.ones(())})
    with pytest.raises(SourceError, match=r"experts\.2\.w3\.weight of .* already quantized; give the original"):
        open_source(str(tmp_path))


def test_two_tensors_for_one_parameter_are_refused(tmp_path: Path) -> None:
    save_tiny("qwen2", tmp_path)
    _rewrite(tmp_path, {"norm.weight": torch.zeros(32)})
    with pytest.raises(SourceError, match=r"twice, as model\.norm\.weight and as norm\.weight"):
        open_source(str(tmp_path))
