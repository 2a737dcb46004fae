"""Tuning of a whole model: the reported divergences are those that transformers measures on the checkpoint."""

from __future__ import annotations

import random
import string
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

import shiftadd_cli
from shiftadd_cli.artifact.folder import Artifact
from shiftadd_cli.artifact.verify import verify
from shiftadd_cli.cli.summary import summarize
from shiftadd_cli.data.text import load_text, sample_windows
from shiftadd_cli.distillation import distill as module
from shiftadd_cli.pipeline import stored_model
from shiftadd_cli.source import open_source

# Without drift, there is more to tune.
FIELDS: dict[str, Any] = {"bits": 1, "samples": 64, "seq_len": 32, "batch_size": 4, "group_size": 16, "fit_rounds": 1,
                          "drift": 0.0}  # fmt: skip
# The last two of the sixteen batches are held out.
HELD_OUT = slice(56, 64)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random letters, which suit a random model as well as any text does."""
    generator = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(generator.choices(string.ascii_letters + " .,", k=12000)))
    return path


def windows(model: Path, text: Path) -> Tensor:
    tokenizer = open_source(str(model)).load_tokenizer()
    return sample_windows(load_text(str(text), split="calibration"), tokenizer, samples=64, seq_len=32, seed=0)


def log_probabilities(folder: Path, tokens: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if hasattr(model, "dequantize") and "quantization_config" in model.config.to_dict():
        model = model.dequantize()
    with torch.no_grad():
        return model(input_ids=tokens).logits.double().log_softmax(-1)


def divergence(original: Path, folder: Path, tokens: Tensor) -> float:
    """Mean KL(original || artifact) over all predictions, by transformers."""
    reference, prediction = log_probabilities(original, tokens), log_probabilities(folder, tokens)
    return float((reference.exp() * (reference - prediction)).sum(-1).mean())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize(
    "fields", [{}, {"primitive": "shift1", "bits": 2, "reconstruct_epochs": 1, "asymmetric": 0.0}], ids=str
)
def test_tuned_model_predicts_more_like_the_original(
    tmp_path: Path, text: Path, family: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A tiny random model needs larger steps, because it takes only a few.
    monkeypatch.setattr(module, "_RATE", 0.02)
    model = save_tiny(family, tmp_path / "model")
    # Both models use the head and the embedding of the artifact, which are exact without 8-bit rows.
    settings = FIELDS | {"calibration": str(text), "embedding_bits": 16} | fields
    plain = shiftadd_cli.quantize(str(model), tmp_path / "plain", **settings)
    report = shiftadd_cli.quantize(str(model), tmp_path / "tuned", distill_epochs=2, **settings)
    verify(Artifact.open(tmp_path / "tuned"))
    held_out = windows(model, text)[HELD_OUT]
    tuning = report.distillation
    assert tuning is not None
    assert tuning.divergence_after is not None
    assert tuning.kept
    assert tuning.divergence_before == pytest.approx(divergence(model, tmp_path / "plain", held_out), rel=1e-3)
    assert tuning.divergence_after == pytest.approx(divergence(model, tmp_path / "tuned", held_out), rel=1e-3)
    assert tuning.divergence_after < 0.97 * tuning.divergence_before
    assert report.size == plain.size
    assert plain.distillation is None
    assert f"-> {tuning.divergence_after:.4f}" in summarize(report, "out")


def test_tuning_that_is_worse_on_held_out_text_is_undone(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny("llama", tmp_path / "model")
    settings = FIELDS | {"calibration": str(text)}
    shiftadd_cli.quantize(str(model), tmp_path / "plain", **settings)
    monkeypatch.setattr(module, "_RATE", 5.0)
    report = shiftadd_cli.quantize(str(model), tmp_path / "tuned", distill_epochs=1, **settings)
    assert report.distillation is not None
    assert report.distillation.divergence_after is not None
    assert not report.distillation.kept
    assert report.distillation.divergence_after >= report.distillation.divergence_before
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "tuned")]
    assert weights[0] == weights[1]
    assert "tuning made it worse" in summarize(report, "out")


def test_tuning_that_overflows_is_undone(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny("llama", tmp_path / "model")
    monkeypatch.setattr(module, "_RATE", 1e30)
    report = shiftadd_cli.quantize(str(model), tmp_path / "out", distill_epochs=1, calibration=str(text), **FIELDS)
    assert report.distillation is not None
    assert not report.distillation.kept
    assert report.distillation.divergence_after is None
    assert "tuning made it worse" in summarize(report, "out")
    assert "made it worse and was undone" in (tmp_path / "out" / "report.html").read_text()


def test_decoding_blocks_on_demand_changes_nothing(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny("bloom", tmp_path / "model", dtype=torch.bfloat16)
    settings = FIELDS | {"calibration": str(text), "distill_epochs": 1}
    shiftadd_cli.quantize(str(model), tmp_path / "cached", **settings)
    monkeypatch.setattr(stored_model, "Stack", partial(stored_model.Stack, memory_bytes=0))
    shiftadd_cli.quantize(str(model), tmp_path / "on_demand", **settings)
    weights = [Path(tmp_path / name / "model.safetensors").read_bytes() for name in ("cached", "on_demand")]
    assert weights[0] == weights[1]
