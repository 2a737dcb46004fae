"""Detecting text in which the model fell into a loop."""

from __future__ import annotations

import torch
from torch import Tensor

# Tokens of a phrase, and the largest allowed share of repeated phrases in half a window. Measured on whole windows of
# 512 tokens of SmolLM2: one window in a hundred has .12 or more in the Brown corpus, and .33 in Python's documentation.
# A looping window has over .5.
PHRASE = 4
MOST_REPEATED = 0.4


def repeated_share(tokens: Tensor) -> float:
    """The share of phrases of `PHRASE` tokens, int64 `[n]`, that occurred before; 0 below two phrases."""
    if len(tokens) <= PHRASE:
        return 0.0
    phrases = tokens.unfold(0, PHRASE, 1)
    return 1 - len(torch.unique(phrases, dim=0)) / len(phrases)


def is_degenerate(tokens: Tensor) -> bool:
    """Whether either half of a text, int64 `[n]`, or its middle half, repeats more than `MOST_REPEATED` of itself."""
    size = max(PHRASE + 1, len(tokens) // 2)
    starts = range(0, max(1, len(tokens) - size + 1), max(1, size // 2))
    return any(repeated_share(tokens[start : start + size]) > MOST_REPEATED for start in starts)
