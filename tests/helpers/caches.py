"""Key-value caches: comparison, and the changes that other code makes to them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


def assert_same(one: DynamicCache, other: DynamicCache) -> None:
    assert one.get_seq_length() == other.get_seq_length()
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        assert all(map(torch.equal, _contents(mine), _contents(theirs)))


def crop(caches: Iterable[DynamicCache]) -> None:
    """Remove up to two tokens from the end, but leave at least one."""
    for cache in caches:
        cache.crop(-min(2, cache.get_seq_length() - 1))


def reorder(caches: Iterable[DynamicCache]) -> None:
    """Continue with the third of three rows, and twice with the first."""
    for cache in caches:
        cache.reorder_cache(torch.LongTensor([2, 0, 0]))


def _contents(layer: object) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer that has both."""
    assert isinstance(layer, DynamicLayer)
    assert layer.keys is not None
    assert layer.values is not None
    return layer.keys, layer.values
