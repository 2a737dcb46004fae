"""Loops are detected anywhere in a window, and text is not taken for a loop."""

from __future__ import annotations

import random
from pydoc_data.topics import topics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shiftadd_cli.self_text.repetition import PHRASE, is_degenerate, repeated_share


def slow_share(tokens: list[int]) -> float:
    phrases = [tuple(tokens[start : start + PHRASE]) for start in range(len(tokens) - PHRASE + 1)]
    if len(phrases) < 2:
        return 0.0
    return sum(phrase in phrases[:index] for index, phrase in enumerate(phrases)) / len(phrases)


def varied(length: int, seed: int = 0) -> Tensor:
    return torch.randint(10_000, (length,), generator=torch.Generator().manual_seed(seed))


@given(st.lists(st.integers(min_value=0, max_value=3), max_size=60))
def test_the_share_counts_phrases_seen_before(tokens: list[int]) -> None:
    assert repeated_share(torch.tensor(tokens, dtype=torch.int64)) == pytest.approx(slow_share(tokens))


@pytest.mark.parametrize("period", [1, 2, 7, 30])
@pytest.mark.parametrize("start", [0, 100, 256])
def test_a_loop_of_half_a_window_is_degenerate(period: int, start: int) -> None:
    window = varied(512)
    window[start : start + 256] = varied(period, seed=1).repeat(256)[:256]
    assert is_degenerate(window)


def test_random_tokens_are_not_degenerate() -> None:
    assert not is_degenerate(varied(512))


def test_a_short_loop_is_not_degenerate() -> None:
    window = varied(512)
    window[200:240] = 5
    assert not is_degenerate(window)


def test_documentation_is_not_degenerate() -> None:
    words = " ".join(topics[name] for name in sorted(topics)).split()
    numbers = {word: number for number, word in enumerate(dict.fromkeys(words))}
    tokens = torch.tensor([numbers[word] for word in words])
    starts = random.Random(0).sample(range(len(tokens) - 512), 100)
    assert sum(is_degenerate(tokens[start : start + 512]) for start in starts) <= 2


@pytest.mark.parametrize("length", [1, 2, 5, 9])
def test_windows_of_a_few_tokens_are_not_degenerate(length: int) -> None:
    assert not is_degenerate(varied(length))
