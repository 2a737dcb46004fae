"""Pearson's test of drawn tokens."""

from __future__ import annotations

from torch import Tensor


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """Pearson's statistic over its degrees of freedom; rare tokens are counted together."""
    expected = probabilities.double() * counts.sum()
    common = expected >= 5
    pairs = [(counts[common], expected[common]), (counts[~common].sum()[None], expected[~common].sum()[None])]
    cells = [(seen, mean) for seen, mean in pairs if mean.sum() > 0]
    statistic = sum(float(((seen - mean) ** 2 / mean).sum()) for seen, mean in cells)
    return statistic / (sum(len(mean) for _, mean in cells) - 1)
