"""The check of architectures, on a sample of them: right results stay right, and wrong ones are detected."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import check as checking
from architectures.check import check
from architectures.factory import Architecture, architectures
from architectures.listening import Heard, listening
from safetensors.torch import load_file, save_file

# Nearly all of the weights of their linear layers are compressed, and everything agrees. One of each kind: the script
# itself checks all others.
RIGHT = (
    "BambaForCausalLM",
    "BioGptForCausalLM",
    "BloomForCausalLM",
    "DeepseekV3ForCausalLM",
    "DeepseekV4ForCausalLM",
    "FalconForCausalLM",
    "Gemma3nForCausalLM",
    "GlmMoeDsaForCausalLM",
    "GPT2LMHeadModel",
    "GptOssForCausalLM",
    "JambaForCausalLM",
    "Lfm2ForCausalLM",
    "Llama4ForCausalLM",
    "MambaForCausalLM",
    "MptForCausalLM",
    "NemotronHForCausalLM",
    "OlmoHybridForCausalLM",
    "Qwen3_5ForCausalLM",
    "RecurrentGemmaForCausalLM",
    "XGLMForCausalLM",
    "Zamba2ForCausalLM",
    "SwinForImageClassification",
    "ViTForImageClassification",
)
# A part of the error message.
REFUSED = {
    "ResNetForImageClassification": "has no blocks to compress",
    "ConvNextForImageClassification": "does not pass tokens through its blocks one by one",
    "ShieldGemma2ForImageClassification": "only its vision tower can be compressed",
}


def _named(name: str) -> Architecture:
    return next(architecture for architecture in architectures() if architecture.name == name)


@pytest.mark.parametrize("name", RIGHT)
def test_architecture_is_right(name: str, tmp_path: Path) -> None:
    outcome = check(_named(name), tmp_path)
    assert (outcome.status, outcome.note) == ("right", "")
    assert outcome.share is not None
    assert outcome.share > 0.8


@pytest.mark.parametrize(("name", "sentence"), REFUSED.items())
def test_architecture_is_refused_with_a_reason(name: str, sentence: str, tmp_path: Path) -> None:
    outcome = check(_named(name), tmp_path)
    assert outcome.status == "refused"
    assert sentence in outcome.note


def test_wrong_calibration_inputs_are_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def disturbed() -> Iterator[Heard]:
        with listening() as recorded:
            yield recorded
        for tensors in recorded.inputs.values():
            for tensor in tensors:
                tensor.mul_(1.001)

    monkeypatch.setattr(checking, "listening", disturbed)
    outcome = check(_named("LlamaForCausalLM"), tmp_path)
    assert outcome.status == "broken"
    assert "calibration never gave model.layers.0.self_attn.q_proj" in outcome.note


@pytest.mark.parametrize(
    ("name", "tensor", "value", "sentence"),
    [
        ("LlamaForCausalLM", "model.norm.weight", 3.0, "model.norm.weight is not compressed, but its values"),
        ("GPT2LMHeadModel", "transformer.h.1.mlp.c_fc.bias", torch.nan, "logits of the dense export are not finite"),
    ],
)
def test_wrong_values_in_the_result_are_detected(
    name: str, tensor: str, value: float, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = checking._run

    def then_damage(arguments: list[str]) -> str | None:
        refusal = run(arguments)
        if arguments[0] == "quantize":
            (file,) = (tmp_path / "out").glob("*.safetensors")
            tensors = load_file(file)
            tensors[tensor] = torch.full_like(tensors[tensor], value)
            save_file(tensors, file, {"format": "pt"})
        return refusal

    monkeypatch.setattr(checking, "_run", then_damage)
    outcome = check(_named(name), tmp_path)
    assert outcome.status == "broken"
    assert sentence in outcome.note


@pytest.mark.parametrize("factor", [1.01, torch.nan])
def test_wrong_logits_of_the_loaded_result_are_detected(
    factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disturbed(architecture: Architecture, model: Any, batch: torch.Tensor) -> torch.Tensor:
        packed = hasattr(model.config, "quantization_config")
        return logits(architecture, model, batch) * (factor if packed else 1.0)

    logits = checking._logits
    monkeypatch.setattr(checking, "_logits", disturbed)
    outcome = check(_named("LlamaForCausalLM"), tmp_path)
    assert outcome.status == "broken"
    assert ("not finite" if factor != factor else "by 1.0%") in outcome.note


def test_traceback_of_a_command_counts_as_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: list[str]) -> str | None:
        raise KeyError("no such thing")

    monkeypatch.setattr(checking, "_run", fail)
    outcome = check(_named("LlamaForCausalLM"), tmp_path)
    assert outcome.status == "broken"
    assert "KeyError: 'no such thing'" in outcome.note
    json.dumps(outcome.to_dict())
