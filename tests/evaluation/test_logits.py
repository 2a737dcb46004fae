"""Logits computed by rows equal those of the model's own forward pass, whether or not the head runs separately."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import write_checkpoint
from tiny_models import FAMILIES, VOCAB_SIZE, tiny_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from shiftadd_cli.errors import NumericalError
from shiftadd_cli.evaluation import logits as module
from shiftadd_cli.evaluation.logits import RowLogits
from shiftadd_cli.runtime.table import Int8Linear
from shiftadd_cli.runtime.transformers_plugin import register

WINDOWS = torch.randint(0, VOCAB_SIZE, (3, 17), generator=torch.Generator().manual_seed(1))


def by_rows(reader: RowLogits, rows: int) -> torch.Tensor:
    with torch.inference_mode():
        states = reader.states(WINDOWS)
        return torch.cat([reader.logits(piece) for piece in states.split(rows)])


def full_logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=WINDOWS).logits[:, :-1].reshape(-1, VOCAB_SIZE).float()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_by_rows_equal_the_models_own_logits(family: str) -> None:
    model = tiny_model(family)
    split, full = RowLogits(model, family), RowLogits(model, family)
    split.check(WINDOWS)
    assert split._head is not None
    assert full._head is None
    expected = full_logits(model)
    assert torch.equal(by_rows(full, 7), expected)
    torch.testing.assert_close(by_rows(split, 7), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_an_8_bit_head_runs_by_rows_too(family: str, tmp_path: Path) -> None:
    register()
    folder, _ = write_checkpoint(tiny_model(family), tmp_path / "out", tables=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    reader = RowLogits(model, family)
    reader.check(WINDOWS)
    assert isinstance(reader._head, Int8Linear)
    torch.testing.assert_close(by_rows(reader, 7), full_logits(model), rtol=1e-5, atol=1e-5)


def test_bfloat16_gives_float32_rows() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    reader = RowLogits(model, "llama")
    reader.check(WINDOWS)
    assert reader._head is not None
    assert by_rows(reader, 5).dtype == torch.float32
    torch.testing.assert_close(by_rows(reader, 5), full_logits(model), rtol=2e-2, atol=2e-2)


def test_soft_caps_and_factors_are_detected() -> None:
    capped = tiny_model("gemma3")
    capped.config.final_logit_softcapping = 5.0
    reader = RowLogits(capped, "capped")
    reader.check(WINDOWS)
    assert reader._head is None
    assert by_rows(reader, 7).abs().max() < 5

    class Scaled(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 0.5
            return out

    scaled = tiny_model("llama")
    scaled.__class__ = Scaled
    reader = RowLogits(scaled, "scaled")
    reader.check(WINDOWS)
    assert reader._head is None
    assert torch.equal(by_rows(reader, 7), full_logits(scaled))


def test_full_logits_limit_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    reader = RowLogits(model, "llama")
    monkeypatch.setattr(module, "FULL_LOGITS_BYTES", 3 * 64 * VOCAB_SIZE * 4)
    assert reader.max_windows(64) == 3
    assert reader.max_windows(1000) == 1
    reader.check(WINDOWS)
    assert reader.max_windows(64) is None


def test_non_finite_values_are_refused_by_name() -> None:
    reader = RowLogits(tiny_model("llama"), "the broken one")
    reader.refuse_not_finite(torch.ones(3), "likelihood")
    for bad in (torch.nan, torch.inf):
        with pytest.raises(NumericalError, match=r"the broken one.*float32"):
            reader.refuse_not_finite(torch.tensor([1.0, bad]), "likelihood")
