"""Softmax over the first and the nearest tokens, and a linear state for the tokens between, under one normaliser.

For query i, tokens `j < sinks` and `i - window < j <= i` are near. Their weights are exp(scaling · qᵢ·kⱼ). All others
are distant, and their weights come from a feature map. The output is the mean of all values by these weights. This is
the hybrid of sliding-window and linear attention of LoLCATs (Zhang et al. 2024, arXiv 2410.10254, section 3.3), with
attention sinks (Xiao et al. 2023, arXiv 2309.17453).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shiftadd_cli.runtime.linear_attention.feature_maps import FeatureMap


@dataclass(frozen=True)
class Reach:
    """Which tokens are near.

    Attributes:
        window: the number of nearest tokens, the query's own included, 1 or more.
        sinks: the number of tokens at the beginning of a text.
    """

    window: int
    sinks: int


@dataclass
class State:
    """Sums over distant tokens.

    Attributes:
        values: of features times values, `[rows, kv_heads, features, size of values]`, float32.
        weights: of features, `[rows, kv_heads, features]`, float32.
    """

    values: Tensor
    weights: Tensor

    @classmethod
    def zeros(cls, rows: int, kv_heads: int, features: int, size: int, device: torch.device) -> State:
        """The state before any token."""
        shape = (rows, kv_heads, features)
        return cls(torch.zeros(*shape, size, device=device), torch.zeros(shape, device=device))

    def add(self, features: Tensor, values: Tensor) -> None:
        """Add tokens, given by their features `[rows, kv_heads, tokens, features]`, 0 where a token does not count, and
        values `[rows, kv_heads, tokens, size]`."""
        self.values = self.values + features.transpose(-1, -2) @ values.float()
        self.weights = self.weights + features.sum(-2)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    near: Tensor,
    distant: Tensor,
    feature_map: FeatureMap,
    scaling: float,
    state: State | None = None,
) -> Tensor:
    """Outputs `[rows, heads, queries, size]` in float32.

    Args:
        query: `[rows, heads, queries, size]`. key, value: `[rows, kv_heads, keys, size]`.
        near, distant: for each query and key, whether it counts, `[rows or 1, queries, keys]`, bool. A key counts as at
            most one of them. Each query needs a near key.
        state: further distant tokens, of all queries.
    """
    rows, heads, queries, size = query.shape
    kv_heads, group, values = key.shape[1], heads // key.shape[1], value.float()
    # The queries of all heads that share a key head lie one after the other.
    packed = (rows, kv_heads, group * queries, -1)
    scores = (query.float() * scaling).reshape(rows, kv_heads, -1, size) @ key.float().transpose(-1, -2)
    scores = scores.masked_fill(_hidden(near, group), -torch.inf)
    largest = scores.detach().amax(-1, keepdim=True)
    near_weights = (scores - largest).exp()
    near_weight = near_weights.sum(-1, keepdim=True)
    near_mean = near_weights @ values / near_weight

    log_scale, features = (part.reshape(packed) for part in feature_map.queries(query))
    weights = features @ feature_map.keys(key).transpose(-1, -2)
    weights = weights.masked_fill(_hidden(distant, group), 0.0)
    weight, weighted = weights.sum(-1, keepdim=True), weights @ values
    if state is not None:
        weight = weight + features @ state.weights[..., None]
        weighted = weighted + features @ state.values
    counts = weight > 0
    weight = torch.where(counts, weight, 1.0)
    # The logarithm of distant over near weight. Its sigmoid is the share of distant tokens in all.
    ratio = torch.where(counts, log_scale + (weight / near_weight).log() - largest, -torch.inf)
    mixed = torch.lerp(near_mean, weighted / weight, torch.sigmoid(ratio))
    return mixed.reshape(rows, heads, queries, -1)


def _hidden(mask: Tensor, group: int) -> Tensor:
    """Where a mask `[rows, queries, keys]` is False, as `[rows, 1, group * queries, keys]`; for a single query, one for
    all of the group."""
    hidden = ~mask[:, None]
    return hidden if mask.shape[1] == 1 else hidden.repeat(1, 1, group, 1)


def tokens_within(reach: Reach, queries: Tensor, keys: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """Which keys are near and which are distant, both `[rows, queries, keys]`, bool.

    queries, keys: positions `[queries]`, and `[keys]` or `[rows, keys]`, in ascending order. first: the position of the
    first token of each row, `[rows]`; those before it are padding.
    """
    keys = keys.expand(len(first), -1)[:, None]
    queries, first = queries[None, :, None], first[:, None, None]
    past = (keys <= queries) & (keys >= first)
    near = past & ((keys > queries - reach.window) | (keys < first + reach.sinks))
    # A query of padding attends to itself: its output is never used, and must be finite.
    near = near | ((queries < first) & (keys == queries))
    return near, past & ~near
