"""Recognising a window in which the model fell into a loop."""

from __future__ import annotations

import torch
from torch import Tensor

# Tokens of a phrase, and the share of phrases in half a window that may have been there before. Measured on windows of
# 512 tokens of SmolLM2: one in a hundred of the Brown corpus has .12 in all, and of Python's documentation .33.
# A window that loops has over .5.
PHRASE = 4
MOST_REPEATED = 0.4


def repeated_share(tokens: Tensor) -> float:
    """The share of phrases of `PHRASE` tokens, int64 `[n]`, that occurred before; 0 for a text shorter than two."""
    if len(tokens) <= PHRASE:
        return 0.0
    phrases = tokens.unfold(0, PHRASE, 1)
    return 1 - len(torch.unique(phrases, dim=0)) / len(phrases)


def is_degenerate(window: Tensor) -> bool:
    """Whether half of a window, int64 `[n]`, or a quarter in the middle of it, says little but what it said before."""
    size = max(PHRASE + 1, len(window) // 2)
    starts = range(0, max(1, len(window) - size + 1), max(1, size // 2))
    return any(repeated_share(window[start : start + size]) > MOST_REPEATED for start in starts)
