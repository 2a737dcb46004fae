"""Linear attention by its formula, one query and one key at a time, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shiftadd_cli.artifact.linear_attention import Heads
from shiftadd_cli.runtime.linear_attention.attention import Reach
from shiftadd_cli.runtime.linear_attention.feature_maps import (
    AngularMap,
    BinaryMap,
    ExponentialMap,
    FeatureMap,
    WindowMap,
    make_map,
)


def filled_map(name: str, heads: Heads, seed: int = 0) -> FeatureMap:
    """A map with random parameters."""
    generator = torch.Generator().manual_seed(seed)
    made = make_map(name, heads)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return made


def distant_weights(feature_map: FeatureMap, head: int, query: Tensor, key: Tensor) -> Tensor:
    """Weights `[queries, keys]` of distant keys `[keys, size]` for queries `[queries, size]` of a head, all float64."""
    group = head // (feature_map.heads.queries // feature_map.heads.keys)
    parts = {name: parameter.detach().double() for name, parameter in feature_map.named_parameters()}
    if isinstance(feature_map, WindowMap):
        return torch.zeros(len(query), len(key), dtype=torch.float64)
    if isinstance(feature_map, ExponentialMap):
        shares = torch.softmax(query @ parts["query_weight"][head] + parts["query_bias"][head], 1)
        features = torch.exp(key @ parts["key_weight"][group] + parts["key_bias"][group])
        return (shares * parts["log_scale"][head].exp()) @ features.T
    scale = (query @ parts["query_weight"][head] + parts["query_bias"][head])[:, None]
    scale = scale + key @ parts["key_weight"][group] + parts["key_bias"][group]
    ours, theirs = (query @ parts["query_turn"][head])[:, None], (key @ parts["key_turn"][group])[None]
    if isinstance(feature_map, AngularMap):
        similarity = 0.5 + torch.cosine_similarity(ours, theirs, dim=-1) / math.pi
    else:
        assert isinstance(feature_map, BinaryMap)
        similarity = ((ours >= 0) == (theirs >= 0)).double().mean(-1)
    return scale.exp() * similarity


def by_formula(
    query: Tensor, key: Tensor, value: Tensor, feature_map: FeatureMap, reach: Reach, first: list[int]
) -> Tensor:
    """Causal outputs `[rows, heads, tokens, size]`, float64; queries before `first` of their row are zero."""
    rows, heads, tokens, size = query.shape
    group = heads // key.shape[1]
    result = torch.zeros(rows, heads, tokens, value.shape[-1], dtype=torch.float64)
    for row in range(rows):
        for head in range(heads):
            own = slice(first[row], tokens)
            q, k, v = (
                tensor[row, index, own].double()
                for tensor, index in ((query, head), (key, head // group), (value, head // group))
            )
            i, j = torch.arange(len(q))[:, None], torch.arange(len(k))
            near = (j > i - reach.window) | (j < reach.sinks)
            weights = torch.where(near, (q @ k.T / math.sqrt(size)).exp(), distant_weights(feature_map, head, q, k))
            weights = torch.where(j <= i, weights, 0.0)
            result[row, head, own] = weights / weights.sum(1, keepdim=True) @ v
    return result
