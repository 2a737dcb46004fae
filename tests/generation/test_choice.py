"""Draws have the distribution of the softmax, and depend on nothing but the logits, the seed and the position."""

from __future__ import annotations

import pytest
import torch
from chi_square import chi_square
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shiftadd_cli.generation.choice import TokenChoice, lead
from shiftadd_cli.generation.sampling import Sampling

VOCABULARY = 50


def logits_of(seed: int, rows: int = 1) -> Tensor:
    return 2 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def chosen(choice: TokenChoice, logits: Tensor, position: int = 0) -> Tensor:
    return choice.scores(logits, position).argmax(-1)


def test_temperature_0_takes_the_likeliest() -> None:
    logits = logits_of(0, 7)
    assert torch.equal(chosen(TokenChoice(Sampling()), logits, 3), logits.argmax(-1))
    halves = logits.bfloat16()
    assert torch.equal(chosen(TokenChoice(Sampling()), halves), halves.argmax(-1))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.7, 0.8)])
def test_draws_have_the_probabilities_of_the_softmax(temperature: float, top_p: float) -> None:
    logits = logits_of(1)
    probabilities = (logits[0] / temperature).double().softmax(-1)
    # Tokens are allowed as long as those before them do not reach top_p.
    order = probabilities.argsort(descending=True)
    before = probabilities[order].cumsum(-1) - probabilities[order]
    probabilities[order[before >= top_p]] = 0
    probabilities /= probabilities.sum()
    choice = TokenChoice(Sampling(temperature=temperature, top_p=top_p, seed=5))
    draws = chosen(choice, logits.expand(20_000, -1))
    counts = torch.bincount(draws, minlength=VOCABULARY)
    assert int(counts[probabilities == 0].sum()) == 0
    # 20 to 50 degrees of freedom: above 2 in less than one of a thousand cases.
    assert 0.3 < chi_square(counts, probabilities) < 2
    # Pairs of successive positions are as independent as their own draws.
    repeats = (draws[1:] == draws[:-1]).double().mean()
    assert abs(float(repeats) - float((probabilities**2).sum())) < 0.015


@given(position=st.integers(0, 10_000), row=st.integers(0, 7), seed=st.integers(0, 2**63 - 1))
def test_a_draw_depends_on_its_position_and_not_on_its_row(position: int, row: int, seed: int) -> None:
    choice, logits = TokenChoice(Sampling(temperature=1.0, seed=seed)), logits_of(2, 8)
    together = choice.scores(logits, position)
    assert torch.equal(together[row], choice.scores(logits[row : row + 1], position + row)[0])
    # As the logits processor of a text with so many tokens.
    text = torch.zeros(1, position + row, dtype=torch.int64)
    assert torch.equal(together[row], choice(text, logits[row : row + 1])[0])


def test_seeds_and_positions_have_their_own_noise() -> None:
    logits = torch.zeros(1, VOCABULARY)
    scores = [
        TokenChoice(Sampling(temperature=1.0, seed=seed)).scores(logits, position)
        for seed in (0, 1, 2**32, 2**62)
        for position in (0, 1, 2**32)
    ]
    assert len({tuple(noise.flatten().tolist()) for noise in scores}) == 12


def test_models_of_fewer_tokens_share_the_noise() -> None:
    choice = TokenChoice(Sampling(temperature=1.0))
    whole = choice.scores(torch.zeros(1, VOCABULARY), 4)
    assert torch.equal(whole[:, :20], choice.scores(torch.zeros(1, 20), 4))


def test_lead_is_the_distance_to_the_second() -> None:
    assert lead(torch.tensor([[1.0, 5.0, 3.5], [2.0, 2.0, 0.0]])).tolist() == [1.5, 0.0]
    assert lead(torch.ones(2, 1)).tolist() == [float("inf")] * 2
