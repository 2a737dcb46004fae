"""Scaled rotary positions from GGUF, against the same model saved by transformers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCAB_SIZE, save_tiny_gguf
from transformers import AutoModelForCausalLM

from shiftadd_cli.errors import SourceError
from shiftadd_cli.source import open_source

_HEAD_DIM, _THETA = 16, 10000.0
_LLAMA3 = {"rope_type": "llama3", "rope_theta": _THETA, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192}  # fmt: skip


def _llama_cpp_divisors(rope: dict[str, Any]) -> list[float]:
    """The divisors that llama.cpp's convert_hf_to_gguf.py writes."""
    divisors = []
    for index in range(_HEAD_DIM // 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (2 * index / _HEAD_DIM)
        original = rope["original_max_position_embeddings"]
        if wavelength < original / rope["high_freq_factor"]:
            divisors.append(1.0)
        elif wavelength > original / rope["low_freq_factor"]:
            divisors.append(rope["factor"])
        else:
            smooth = original / wavelength - rope["low_freq_factor"]
            smooth /= rope["high_freq_factor"] - rope["low_freq_factor"]
            divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return divisors


def _tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (2, 200), generator=torch.Generator().manual_seed(0))


def _assert_reads_as(folder: Path, file: Path) -> dict[str, Any]:
    expected = AutoModelForCausalLM.from_pretrained(folder)
    source = open_source(str(file))
    source.materialise([""])
    model = source.skeleton()
    frequencies = expected.model.rotary_emb.inv_freq
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, frequencies, rtol=1e-6, atol=0)
    assert model.model.rotary_emb.attention_scaling == pytest.approx(expected.model.rotary_emb.attention_scaling)
    torch.testing.assert_close(model(_tokens()).logits, expected(_tokens()).logits, rtol=1e-4, atol=1e-5)
    rope: dict[str, Any] = source.config.rope_parameters
    return rope


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_scaling_is_read_back_unchanged(factor: float, tmp_path: Path) -> None:
    rope = _LLAMA3 | {"factor": factor}
    divisors = _llama_cpp_divisors(rope)
    assert len(set(divisors)) > 2
    file = tmp_path / "m.gguf"
    save_tiny_gguf(file, kind="F32", tensors={"rope_freqs.weight": divisors}, rope_parameters=rope).save_pretrained(
        tmp_path / "m"
    )
    assert _assert_reads_as(tmp_path / "m", file) == rope


def test_other_divisors_are_kept_unchanged(tmp_path: Path) -> None:
    rope = _LLAMA3 | {"factor": 4.0, "low_freq_factor": 1.5, "original_max_position_embeddings": 512}
    file = tmp_path / "m.gguf"
    save_tiny_gguf(
        file, kind="F32", tensors={"rope_freqs.weight": _llama_cpp_divisors(rope)}, rope_parameters=rope
    ).save_pretrained(tmp_path / "m")
    _assert_reads_as(tmp_path / "m", file)


@pytest.mark.parametrize(
    ("rope", "metadata"),
    [
        ({"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
            {"type": "yarn", "factor": 4.0, "original_context_length": 128.0},
        ),
    ],
)
def test_scaling_in_metadata(rope: dict[str, Any], metadata: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    named = {f"llama.rope.scaling.{name}": value for name, value in metadata.items()}
    model = save_tiny_gguf(file, kind="F32", metadata=named, rope_parameters={"rope_theta": _THETA, **rope})
    model.save_pretrained(tmp_path / "m")
    _assert_reads_as(tmp_path / "m", file)


def test_long_and_short_factors(tmp_path: Path) -> None:
    short, long = [1.0 + index / 4 for index in range(8)], [1.0 + index for index in range(8)]
    rope = {"rope_type": "longrope", "rope_theta": _THETA, "short_factor": short, "long_factor": long,
            "original_max_position_embeddings": 256, "factor": 2.0, "attention_factor": 1.25}  # fmt: skip
    file = tmp_path / "m.gguf"
    save_tiny_gguf(
        file,
        kind="F32",
        tensors={"rope_factors_long.weight": long, "rope_factors_short.weight": short},
        metadata={"llama.rope.scaling.original_context_length": 256.0, "llama.rope.scaling.attn_factor": 1.25},
        rope_parameters=rope,
    ).save_pretrained(tmp_path / "m")
    assert _assert_reads_as(tmp_path / "m", file) == rope


@pytest.mark.parametrize(
    ("metadata", "tensors"),
    [
        ({"type": "new"}, {}),
        ({"type": "longrope"}, {}),
        ({"attn_factor": 1.2}, {}),
        ({"type": "yarn", "factor": 4.0, "yarn_log_multiplier": 0.1}, {}),
        ({"type": "linear", "factor": 4.0}, {"rope_freqs.weight": [2.0] * 8}),
        ({}, {"rope_freqs.weight": [0.0] * 8}),
        ({}, {"rope_factors_long.weight": [2.0] * 8}),
    ],
)
def test_other_scaling_is_refused(metadata: dict[str, Any], tensors: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    named = {f"llama.rope.scaling.{name}": value for name, value in metadata.items()}
    save_tiny_gguf(file, kind="F32", metadata=named, tensors=tensors)
    with pytest.raises(SourceError, match=r"scales its rotary positions .* give the model as a safetensors folder"):
        open_source(str(file))
