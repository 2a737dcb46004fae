"""Tuning of a whole model: what is reported is what transformers measures of what is written."""

from __future__ import annotations

import random
import string
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM

import shiftadd_cli
from shiftadd_cli.artifact.folder import Artifact
from shiftadd_cli.artifact.verify import verify
from shiftadd_cli.cli.summary import summarize
from shiftadd_cli.data.text import load_text, sample_windows
from shiftadd_cli.distillation import distill as module
from shiftadd_cli.pipeline import stored_model
from shiftadd_cli.source import open_source

FIELDS = {"bits": 1, "samples": 64, "seq_len": 32, "batch_size": 4, "group_size": 16, "fit_rounds": 1}
# Of the sixteen batches the last two are held back.
HELD_BACK = slice(56, 64)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Letters at random: a random model is as much at home there as anywhere."""
    drawn = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(drawn.choices(string.ascii_letters + " .,", k=12000)))
    return path


def windows(model, text):
    tokenizer = open_source(str(model)).load_tokenizer()
    return sample_windows(load_text(str(text), split="calibration"), tokenizer, samples=64, seq_len=32, seed=0)


def log_chances(folder, tokens):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if hasattr(model, "dequantize") and "quantization_config" in model.config.to_dict():
        model = model.dequantize()
    with torch.no_grad():
        return model(input_ids=tokens).logits.double().log_softmax(-1)


def divergence(original, folder, tokens):
    """Mean KL(original || artifact) over all predictions, by transformers."""
    chances, others = log_chances(original, tokens), log_chances(folder, tokens)
    return float((chances.exp() * (chances - others)).sum(-1).mean())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize(
    "fields", [{}, {"primitive": "shift1", "bits": 2, "reconstruct_epochs": 1, "asymmetric": 0.0}], ids=str
)
def test_the_written_model_predicts_more_like_the_original(tmp_path, text, family, fields, monkeypatch):
    # A random model of a few thousand weights has further to go, in few steps.
    monkeypatch.setattr(module, "_RATE", 0.02)
    model = save_tiny(family, tmp_path / "model")
    # The head and the embedding are those of the artifact for both sides here, and exact without 8-bit rows.
    given = FIELDS | {"calibration": str(text), "embedding_bits": 16} | fields
    plain = shiftadd_cli.quantize(str(model), tmp_path / "plain", **given)
    report = shiftadd_cli.quantize(str(model), tmp_path / "tuned", distill_epochs=2, **given)
    verify(Artifact.open(tmp_path / "tuned"))
    held_back = windows(model, text)[HELD_BACK]
    found = report.distillation
    assert found.kept
    assert found.divergence_before == pytest.approx(divergence(model, tmp_path / "plain", held_back), rel=1e-3)
    assert found.divergence_after == pytest.approx(divergence(model, tmp_path / "tuned", held_back), rel=1e-3)
    assert found.divergence_after < 0.97 * found.divergence_before
    assert report.size == plain.size
    assert plain.distillation is None
    assert f"-> {found.divergence_after:.4f}" in summarize(report, "out")


def test_what_is_worse_on_what_was_held_back_is_not_kept(tmp_path, text, monkeypatch):
    model = save_tiny("llama", tmp_path / "model")
    given = FIELDS | {"calibration": str(text)}
    shiftadd_cli.quantize(str(model), tmp_path / "plain", **given)
    monkeypatch.setattr(module, "_RATE", 5.0)
    report = shiftadd_cli.quantize(str(model), tmp_path / "tuned", distill_epochs=1, **given)
    assert not report.distillation.kept
    assert report.distillation.divergence_after >= report.distillation.divergence_before
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "tuned")]
    assert weights[0] == weights[1]
    assert "tuning made it worse" in summarize(report, "out")


def test_tuning_that_leaves_the_finite_numbers_loses_nothing(tmp_path, text, monkeypatch):
    model = save_tiny("llama", tmp_path / "model")
    monkeypatch.setattr(module, "_RATE", 1e30)
    report = shiftadd_cli.quantize(str(model), tmp_path / "out", distill_epochs=1, calibration=str(text), **FIELDS)
    assert not report.distillation.kept
    assert report.distillation.divergence_after is None
    assert "tuning made it worse" in summarize(report, "out")
    assert "made it worse and was undone" in (tmp_path / "out" / "report.html").read_text()


def test_blocks_that_do_not_stay_decoded_change_nothing(tmp_path, text, monkeypatch):
    model = save_tiny("bloom", tmp_path / "model", dtype=torch.bfloat16)
    given = FIELDS | {"calibration": str(text), "distill_epochs": 1}
    shiftadd_cli.quantize(str(model), tmp_path / "held", **given)
    stack = stored_model.Stack
    monkeypatch.setattr(stored_model, "Stack", lambda *arguments: stack(*arguments, memory_bytes=0))
    shiftadd_cli.quantize(str(model), tmp_path / "anew", **given)
    weights = [Path(tmp_path / name / "model.safetensors").read_bytes() for name in ("held", "anew")]
    assert weights[0] == weights[1]
