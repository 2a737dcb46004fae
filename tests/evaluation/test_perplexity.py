"""Scores against slow float64 formulas and against transformers' own loss."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import VOCAB_SIZE, tiny_model

from shiftadd_cli.data.windows import cut_windows
from shiftadd_cli.errors import CalibrationError, NumericalError, RecipeError
from shiftadd_cli.evaluation import logits as logits_module
from shiftadd_cli.evaluation import perplexity as module
from shiftadd_cli.evaluation.perplexity import score_models

ONE, TWO = tiny_model("llama"), tiny_model("llama", seed=1)


def some_tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed))


def score(model, tokens, context, *, prefix=(), **options):
    windows = cut_windows(tokens, context, prefix)
    return score_models([("model", model)], windows, show_progress=False, **options)[0][0]


def reference(tokens, context, model, original=None):
    """Per window: lists of nll, KL and agreement of each scored token, one window and one token at a time, float64."""
    nll, kl, same = [], [], []
    for start in range(0, len(tokens), context):
        window = tokens[start : start + context]
        if len(window) < 2:
            continue
        rows = [each(input_ids=window.unsqueeze(0)).logits[0].double() for each in (model, original or model)]
        q, p = (torch.softmax(row, -1) for row in rows)
        places = range(len(window) - 1)
        nll.append([-math.log(q[i, window[i + 1]]) for i in places])
        kl.append([sum(a * math.log(a / b) for a, b in zip(p[i].tolist(), q[i].tolist(), strict=True)) for i in places])
        same.append([int(p[i].argmax() == q[i].argmax()) for i in places])
    return nll, kl, same


def mean(windows):
    values = [value for window in windows for value in window]
    return sum(values) / len(values)


def standard_error(windows):
    """Of a ratio of sums over independent windows (Cochran, Sampling Techniques, 6.4)."""
    count, ratio = len(windows), mean(windows)
    total = sum(len(window) for window in windows)
    squares = sum((sum(window) - ratio * len(window)) ** 2 for window in windows)
    return math.sqrt(count / (count - 1) * squares) / total


@torch.no_grad()
@pytest.mark.parametrize(("count", "context"), [(64, 16), (70, 16), (65, 16), (9, 512)])
def test_scores_equal_the_obvious_formulas(count, context):
    tokens = some_tokens(count)
    nll, kl, same = reference(tokens, context, TWO, ONE)
    found, original = score_models(
        [("two", TWO)], cut_windows(tokens, context), batch_size=3, original=("one", ONE), show_progress=False
    )
    assert found[0].nll == pytest.approx(mean(nll), rel=1e-5)
    assert found[0].perplexity == pytest.approx(math.exp(mean(nll)), rel=1e-5)
    assert found[0].kl == pytest.approx(mean(kl), rel=1e-4)
    assert found[0].agreement == pytest.approx(mean(same))
    assert original.nll == pytest.approx(mean(reference(tokens, context, ONE)[0]), rel=1e-5)
    assert (original.kl, original.agreement) == (None, None)
    if len(nll) > 1:
        assert found[0].nll_error == pytest.approx(standard_error(nll), rel=1e-4)
        assert found[0].kl_error == pytest.approx(standard_error(kl), rel=1e-3)
        assert found[0].perplexity_error == pytest.approx(found[0].perplexity * found[0].nll_error)
    else:
        assert (found[0].nll_error, found[0].perplexity_error, found[0].kl_error) == (None, None, None)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "qwen3", "opt"])
def test_perplexity_is_transformers_own_loss_on_the_same_windows(family):
    model, tokens = tiny_model(family), some_tokens(96)
    losses = [model(input_ids=w.unsqueeze(0), labels=w.unsqueeze(0)).loss.item() for w in tokens.split(32)]
    assert score(model, tokens, 32).perplexity == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)


def test_a_model_is_no_distance_from_itself():
    found = score(ONE, some_tokens(100), 32, original=("one", ONE))
    assert found.kl == 0.0
    assert found.agreement == 1.0


def test_a_model_with_random_logits_is_as_good_as_guessing():
    flat = tiny_model("llama")
    flat.lm_head.weight.data.zero_()
    found = score(flat, some_tokens(100), 32, original=("one", ONE))
    assert found.perplexity == pytest.approx(VOCAB_SIZE, rel=1e-5)
    assert found.kl > 0


@given(batch_size=st.integers(1, 9), buffer=st.integers(1, 200), count=st.integers(2, 130))
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_neither_batches_nor_pieces_nor_the_way_change_the_result(monkeypatch, batch_size, buffer, count):
    tokens = some_tokens(count)
    expected = score(TWO, tokens, 24, original=("one", ONE))
    with monkeypatch.context() as patch:
        patch.setattr(module, "BUFFER_BYTES", 4 * VOCAB_SIZE * buffer)
        patch.setattr(logits_module, "FULL_LOGITS_BYTES", 1)
        patch.setattr(logits_module.RowLogits, "check", lambda self, windows: None)
        found = score(TWO, tokens, 24, original=("one", ONE), batch_size=batch_size)
    assert found.nll == pytest.approx(expected.nll, rel=1e-5)
    assert found.kl == pytest.approx(expected.kl, rel=1e-4)
    assert found.agreement == expected.agreement


def test_several_candidates_score_as_each_alone():
    tokens = some_tokens(90)
    three = tiny_model("llama", seed=2)
    both, _ = score_models(
        [("two", TWO), ("three", three)], cut_windows(tokens, 32), original=("one", ONE), show_progress=False
    )
    for found, model in zip(both, (TWO, three), strict=True):
        alone = score(model, tokens, 32, original=("one", ONE))
        assert (found.nll, found.kl, found.agreement) == (alone.nll, alone.kl, alone.agreement)


def test_no_float32_buffer_exceeds_the_bound(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "BUFFER_BYTES", 4 * VOCAB_SIZE * 10)
    original = logits_module.RowLogits.logits

    def watch(self, states):
        rows = original(self, states)
        seen.append(tuple(rows.shape))
        return rows

    monkeypatch.setattr(logits_module.RowLogits, "logits", watch)
    score(ONE, some_tokens(128), 64)
    assert seen
    assert all(rows <= 10 and width == VOCAB_SIZE for rows, width in seen)


class Ruled(type(ONE)):
    """Rules out the second half of the vocabulary."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits[..., VOCAB_SIZE // 2 :] = -torch.inf
        return out


def ruled(seed: int):
    model = tiny_model("llama", seed=seed)
    model.__class__ = Ruled
    return model


def test_tokens_that_both_models_rule_out_count_nothing():
    tokens = some_tokens(60) % (VOCAB_SIZE // 2)
    found = score(ruled(1), tokens, 30, original=("ruled", ruled(0)))

    def half(model):
        with torch.no_grad():
            windows = tokens.view(2, 30)
            return model(input_ids=windows).logits[:, :-1, : VOCAB_SIZE // 2].double().log_softmax(-1)

    p, q = half(ONE), half(TWO)
    assert found.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)


def test_what_the_model_rules_out_and_the_original_does_not_is_refused():
    with pytest.raises(NumericalError, match="KL divergence"):
        score(ruled(1), some_tokens(60) % (VOCAB_SIZE // 2), 30, original=("one", ONE))


def test_nan_is_refused_by_name():
    broken = tiny_model("llama")
    broken.model.norm.weight.data[0] = torch.nan
    with pytest.raises(NumericalError, match=r"model gives a likelihood that is not finite in float32"):
        score(broken, some_tokens(20), 10)


@pytest.mark.parametrize("count", [0, 1])
def test_too_little_to_predict_is_refused(count):
    with pytest.raises(CalibrationError, match="needs a token to predict"):
        score(ONE, some_tokens(count), 8)


def test_windows_beyond_the_positions_are_refused():
    with pytest.raises(RecipeError, match=r"513 tokens is longer than the 512 positions of model; give `context` 512"):
        score(ONE, some_tokens(600), 513)
    assert score(ONE, some_tokens(40), 513).nll > 0


@torch.no_grad()
@pytest.mark.parametrize("prefix", [(3,), (3, 7)])
def test_behind_a_prefix_every_token_is_predicted_from_it_and_those_before(prefix):
    tokens, own = some_tokens(90), 30
    nll, kl = [], []
    for part in tokens.split(own):
        window = torch.cat((torch.tensor(prefix), part)).unsqueeze(0)
        chances = [
            each(input_ids=window).logits[0].double().log_softmax(-1)[len(prefix) - 1 : -1] for each in (TWO, ONE)
        ]
        nll.append(-chances[0].gather(1, part.unsqueeze(1)).squeeze(1))
        kl.append((chances[1].exp() * (chances[1] - chances[0])).sum(-1))
    found = score(TWO, tokens, own + len(prefix), prefix=prefix, original=("one", ONE))
    assert found.nll == pytest.approx(torch.cat(nll).mean().item(), rel=1e-5)
    assert found.kl == pytest.approx(torch.cat(kl).mean().item(), rel=1e-4)


def test_another_vocabulary_is_refused():
    other = tiny_model("llama")
    other.resize_token_embeddings(VOCAB_SIZE + 8)
    with pytest.raises(RecipeError, match=r"vocabulary of 328 and original one of 320"):
        score(other, some_tokens(20), 10, original=("original", ONE))
