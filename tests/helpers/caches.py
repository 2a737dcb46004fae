"""Caches of keys and values: compared, and what others do to them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import DynamicCache


def assert_same(one: DynamicCache, other: DynamicCache) -> None:
    assert one.get_seq_length() == other.get_seq_length()
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(mine.values, theirs.values)


def crop(caches: Iterable[DynamicCache]) -> None:
    """Take two tokens from the end, and leave one at least."""
    for cache in caches:
        cache.crop(-min(2, cache.get_seq_length() - 1))


def reorder(caches: Iterable[DynamicCache]) -> None:
    """Go on with the third of three rows, and twice with the first."""
    for cache in caches:
        cache.reorder_cache(torch.tensor([2, 0, 0]))
