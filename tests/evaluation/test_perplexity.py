"""Scores compared with slow float64 formulas and with transformers' own loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import VOCAB_SIZE, tiny_model
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from shiftadd_cli.data.windows import cut_windows
from shiftadd_cli.errors import CalibrationError, NumericalError, RecipeError
from shiftadd_cli.evaluation import logits as logits_module
from shiftadd_cli.evaluation import perplexity as module
from shiftadd_cli.evaluation.perplexity import Score, score_models

ONE, TWO = tiny_model("llama"), tiny_model("llama", seed=1)


def some_tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed))


def score(
    model: PreTrainedModel, tokens: Tensor, context: int, *, prefix: tuple[int, ...] = (), **options: Any
) -> Score:
    windows = cut_windows(tokens, context, prefix)
    return score_models([("model", model)], windows, show_progress=False, **options)[0][0]


def reference(
    tokens: Tensor, context: int, model: PreTrainedModel, original: PreTrainedModel | None = None
) -> tuple[list[list[float]], list[list[float]], list[list[int]]]:
    """Lists of nll, KL and agreement of the scored tokens of each window, computed one token at a time in float64."""
    nll, kl, same = [], [], []
    for start in range(0, len(tokens), context):
        window = tokens[start : start + context]
        if len(window) < 2:
            continue
        rows = [candidate(input_ids=window.unsqueeze(0)).logits[0].double() for candidate in (model, original or model)]
        q, p = (torch.softmax(row, -1) for row in rows)
        positions = range(len(window) - 1)
        nll.append([-math.log(q[i, window[i + 1]]) for i in positions])
        kl.append(
            [sum(a * math.log(a / b) for a, b in zip(p[i].tolist(), q[i].tolist(), strict=True)) for i in positions]
        )
        same.append([int(p[i].argmax() == q[i].argmax()) for i in positions])
    return nll, kl, same


def mean(windows: Sequence[Sequence[float]]) -> float:
    values = [value for window in windows for value in window]
    return sum(values) / len(values)


def standard_error(windows: Sequence[Sequence[float]]) -> float:
    """The standard error of a ratio of sums over independent windows (Cochran, Sampling Techniques, 6.4)."""
    count, ratio = len(windows), mean(windows)
    total = sum(len(window) for window in windows)
    squares = sum((sum(window) - ratio * len(window)) ** 2 for window in windows)
    return math.sqrt(count / (count - 1) * squares) / total


@torch.no_grad()
@pytest.mark.parametrize(("count", "context"), [(64, 16), (70, 16), (65, 16), (9, 512)])
def test_scores_match_plain_formulas(count: int, context: int) -> None:
    tokens = some_tokens(count)
    nll, kl, same = reference(tokens, context, TWO, ONE)
    (result,), original = score_models(
        [("two", TWO)], cut_windows(tokens, context), batch_size=3, original=("one", ONE), show_progress=False
    )
    assert result.nll == pytest.approx(mean(nll), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(mean(nll)), rel=1e-5)
    assert result.kl == pytest.approx(mean(kl), rel=1e-4)
    assert result.agreement == pytest.approx(mean(same))
    assert original is not None
    assert original.nll == pytest.approx(mean(reference(tokens, context, ONE)[0]), rel=1e-5)
    assert (original.kl, original.agreement) == (None, None)
    if len(nll) > 1:
        assert result.nll_error == pytest.approx(standard_error(nll), rel=1e-4)
        assert result.kl_error == pytest.approx(standard_error(kl), rel=1e-3)
        assert result.nll_error is not None
        assert result.perplexity_error == pytest.approx(result.perplexity * result.nll_error)
    else:
        assert (result.nll_error, result.perplexity_error, result.kl_error) == (None, None, None)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "qwen3", "opt"])
def test_perplexity_matches_transformers_own_loss(family: str) -> None:
    model, tokens = tiny_model(family), some_tokens(96)
    losses = [model(input_ids=w.unsqueeze(0), labels=w.unsqueeze(0)).loss.item() for w in tokens.split(32)]
    assert score(model, tokens, 32).perplexity == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)


def test_a_model_has_no_distance_from_itself() -> None:
    result = score(ONE, some_tokens(100), 32, original=("one", ONE))
    assert result.kl == 0.0
    assert result.agreement == 1.0


def test_a_model_with_equal_logits_scores_like_guessing() -> None:
    flat = tiny_model("llama")
    flat.lm_head.weight.data.zero_()
    result = score(flat, some_tokens(100), 32, original=("one", ONE))
    assert result.perplexity == pytest.approx(VOCAB_SIZE, rel=1e-5)
    assert result.kl is not None
    assert result.kl > 0


@given(batch_size=st.integers(1, 9), buffer=st.integers(1, 200), count=st.integers(2, 130))
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_scores_do_not_depend_on_batches_and_buffers(
    monkeypatch: pytest.MonkeyPatch, batch_size: int, buffer: int, count: int
) -> None:
    tokens = some_tokens(count)
    expected = score(TWO, tokens, 24, original=("one", ONE))
    with monkeypatch.context() as patch:
        patch.setattr(module, "BUFFER_BYTES", 4 * VOCAB_SIZE * buffer)
        patch.setattr(logits_module, "FULL_LOGITS_BYTES", 1)
        patch.setattr(logits_module.RowLogits, "check", lambda self, windows: None)
        result = score(TWO, tokens, 24, original=("one", ONE), batch_size=batch_size)
    assert result.nll == pytest.approx(expected.nll, rel=1e-5)
    assert result.kl == pytest.approx(expected.kl, rel=1e-4)
    assert result.agreement == expected.agreement


def test_candidates_score_together_as_they_do_alone() -> None:
    tokens = some_tokens(90)
    three = tiny_model("llama", seed=2)
    both, _ = score_models(
        [("two", TWO), ("three", three)], cut_windows(tokens, 32), original=("one", ONE), show_progress=False
    )
    for result, model in zip(both, (TWO, three), strict=True):
        alone = score(model, tokens, 32, original=("one", ONE))
        assert (result.nll, result.kl, result.agreement) == (alone.nll, alone.kl, alone.agreement)


def test_no_float32_buffer_exceeds_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    monkeypatch.setattr(module, "BUFFER_BYTES", 4 * VOCAB_SIZE * 10)
    original = logits_module.RowLogits.logits

    def watch(self: logits_module.RowLogits, states: Tensor) -> Tensor:
        rows = original(self, states)
        shapes.append(tuple(rows.shape))
        return rows

    monkeypatch.setattr(logits_module.RowLogits, "logits", watch)
    score(ONE, some_tokens(128), 64)
    assert shapes
    assert all(rows <= 10 and width == VOCAB_SIZE for rows, width in shapes)


class HalfVocabulary(LlamaForCausalLM):
    """Rules out the second half of the vocabulary."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits[..., VOCAB_SIZE // 2 :] = -torch.inf
        return out


def half_vocabulary(seed: int) -> PreTrainedModel:
    model = tiny_model("llama", seed=seed)
    model.__class__ = HalfVocabulary
    return model


def test_tokens_ruled_out_by_both_models_do_not_count() -> None:
    tokens = some_tokens(60) % (VOCAB_SIZE // 2)
    result = score(half_vocabulary(1), tokens, 30, original=("original", half_vocabulary(0)))

    def log_chances(model: PreTrainedModel) -> Tensor:
        with torch.no_grad():
            windows = tokens.view(2, 30)
            return model(input_ids=windows).logits[:, :-1, : VOCAB_SIZE // 2].double().log_softmax(-1)

    p, q = log_chances(ONE), log_chances(TWO)
    assert result.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)


def test_tokens_ruled_out_by_the_model_alone_are_refused() -> None:
    with pytest.raises(NumericalError, match="KL divergence"):
        score(half_vocabulary(1), some_tokens(60) % (VOCAB_SIZE // 2), 30, original=("one", ONE))


def test_nan_is_refused_by_name() -> None:
    broken = tiny_model("llama")
    broken.model.norm.weight.data[0] = torch.nan
    with pytest.raises(NumericalError, match=r"model gives a likelihood that is not finite in float32"):
        score(broken, some_tokens(20), 10)


@pytest.mark.parametrize("count", [0, 1])
def test_a_text_without_a_token_to_predict_is_refused(count: int) -> None:
    with pytest.raises(CalibrationError, match="needs a token to predict"):
        score(ONE, some_tokens(count), 8)


def test_windows_longer_than_the_positions_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"513 tokens is longer than the 512 positions of model; give `context` 512"):
        score(ONE, some_tokens(600), 513)
    assert score(ONE, some_tokens(40), 513).nll > 0


@torch.no_grad()
@pytest.mark.parametrize("prefix", [(3,), (3, 7)])
def test_every_token_after_a_prefix_is_predicted(prefix: tuple[int, ...]) -> None:
    tokens, text_length = some_tokens(90), 30
    nll, kl = [], []
    for part in tokens.split(text_length):
        window = torch.cat((torch.tensor(prefix), part)).unsqueeze(0)
        chances = [
            model(input_ids=window).logits[0].double().log_softmax(-1)[len(prefix) - 1 : -1] for model in (TWO, ONE)
        ]
        nll.append(-chances[0].gather(1, part.unsqueeze(1)).squeeze(1))
        kl.append((chances[1].exp() * (chances[1] - chances[0])).sum(-1))
    result = score(TWO, tokens, text_length + len(prefix), prefix=prefix, original=("one", ONE))
    assert result.nll == pytest.approx(torch.cat(nll).mean().item(), rel=1e-5)
    assert result.kl == pytest.approx(torch.cat(kl).mean().item(), rel=1e-4)


def test_a_different_vocabulary_is_refused() -> None:
    other = tiny_model("llama")
    other.resize_token_embeddings(VOCAB_SIZE + 8)
    with pytest.raises(RecipeError, match=r"vocabulary of 328 and original one of 320"):
        score(other, some_tokens(20), 10, original=("original", ONE))
