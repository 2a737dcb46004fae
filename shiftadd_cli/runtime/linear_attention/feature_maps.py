"""Feature maps: functions of a query and a key whose products stand for the softmax weight of a distant token.

The weight of key k for query q is `exp(log_scale(q)) · features(q)·features(k)`, where softmax attention has
`exp(scaling · q·k)`. The sum over any number of keys then needs only the sum of their features.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from shiftadd_cli.artifact.linear_attention import MAP_TENSORS, Heads

# Logarithms of key features are cut off here, so that sums over a million keys stay finite in float32.
_HIGHEST_LOG = 40.0


class FeatureMap(nn.Module, ABC):
    """A map for all heads of one layer. Its parameters, those of `MAP_TENSORS`, and its results are float32.

    Attributes:
        features: the number of features of a key.
    """

    name: ClassVar[str]

    def __init__(self, heads: Heads, features: int) -> None:
        super().__init__()
        self.heads, self.features = heads, features
        for name, shape in MAP_TENSORS[self.name](heads).items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=torch.float32)))

    @abstractmethod
    def queries(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithm of the scale `[rows, heads, tokens, 1]` and features `[rows, heads, tokens, features]` of queries
        `[rows, heads, tokens, size]`. Features are at most about 1."""

    @abstractmethod
    def keys(self, key: Tensor) -> Tensor:
        """Features `[rows, kv_heads, tokens, features]` of keys `[rows, kv_heads, tokens, size]`."""

    @abstractmethod
    def start(self, query: Tensor, key: Tensor, scaling: float, generator: torch.Generator) -> None:
        """Set the parameters from sampled queries `[heads, samples, size]` and keys `[kv_heads, samples, size]`.

        scaling: of the products of softmax attention.
        """


class ExponentialMap(FeatureMap):
    """Feature f of a key is exp(wᶠ·k + bᶠ), and a query takes a share of each feature, by a softmax.

    It starts from a codebook c¹, c², ... of the queries of each key head: exp(scaling · cᶠ·k) is then the exact weight
    of key k for the query cᶠ, and the shares say how close a query is to each. All weights are fitted afterwards. Key
    features of this form are those of Hedgehog (Zhang et al. 2024, arXiv 2402.04347, section 4.2).
    """

    name = "exp"
    # The logit of the share of a centre at the start: minus the squared distance to it, in units of the mean squared
    # distance of a query to its nearest centre, times this.
    _SHARPNESS = 2.0
    _K_MEANS_ROUNDS = 10

    query_weight: nn.Parameter
    query_bias: nn.Parameter
    log_scale: nn.Parameter
    key_weight: nn.Parameter
    key_bias: nn.Parameter

    def __init__(self, heads: Heads) -> None:
        super().__init__(heads, heads.size)

    def queries(self, query: Tensor) -> tuple[Tensor, Tensor]:
        shares = (query.float() @ self.query_weight + self.query_bias[:, None]).log_softmax(-1)
        logits = shares + self.log_scale[:, None]
        largest = logits.detach().amax(-1, keepdim=True)
        return largest, (logits - largest).exp()

    def keys(self, key: Tensor) -> Tensor:
        logits = key.float() @ self.key_weight + self.key_bias[:, None]
        return logits.clamp(max=_HIGHEST_LOG).exp()

    @torch.no_grad()
    def start(self, query: Tensor, key: Tensor, scaling: float, generator: torch.Generator) -> None:
        group = self.heads.queries // self.heads.keys
        for index in range(self.heads.keys):
            own = slice(index * group, (index + 1) * group)
            queries = query[own].flatten(0, 1).float()
            codebook = k_means(queries, self.features, self._K_MEANS_ROUNDS, generator)
            distance = torch.cdist(queries, codebook).amin(1).square().mean().clamp(min=1e-12)
            sharpness = 2 * self._SHARPNESS / distance
            weight = scaling * codebook.T
            # Every feature is at most 1 for the sampled keys, and the query's scale undoes that.
            largest = (key[index].float() @ weight).amax(0)
            self.key_weight[index], self.key_bias[index] = weight, -largest
            self.log_scale[own] = largest
            self.query_weight[own] = sharpness * codebook.T
            self.query_bias[own] = -sharpness / 2 * codebook.square().sum(1)


class _SimilarityMap(FeatureMap):
    """A similarity of the directions of fitted images of q and k, times a factor of each, log-linear in q and in k."""

    query_turn: nn.Parameter
    key_turn: nn.Parameter
    query_weight: nn.Parameter
    query_bias: nn.Parameter
    key_weight: nn.Parameter
    key_bias: nn.Parameter

    def __init__(self, heads: Heads) -> None:
        super().__init__(heads, heads.size + 1)

    def queries(self, query: Tensor) -> tuple[Tensor, Tensor]:
        query = query.float()
        scale = (query * self.query_weight[:, None]).sum(-1, keepdim=True) + self.query_bias[:, None, None]
        direction = self._direction(query @ self.query_turn)
        return scale, torch.cat([direction / self._divisor(), torch.full_like(scale, 0.5)], -1)

    def keys(self, key: Tensor) -> Tensor:
        key = key.float()
        scale = (key * self.key_weight[:, None]).sum(-1, keepdim=True) + self.key_bias[:, None, None]
        direction = self._direction(key @ self.key_turn)
        return torch.cat([direction, torch.ones_like(scale)], -1) * scale.clamp(max=_HIGHEST_LOG).exp()

    @torch.no_grad()
    def start(self, query: Tensor, key: Tensor, scaling: float, generator: torch.Generator) -> None:
        turn, _ = torch.linalg.qr(torch.randn(self.heads.size, self.heads.size, generator=generator))
        self.query_turn.copy_(turn.to(self.query_turn.device).expand_as(self.query_turn))
        self.key_turn.copy_(turn.to(self.key_turn.device).expand_as(self.key_turn))

    @abstractmethod
    def _direction(self, image: Tensor) -> Tensor: ...

    @abstractmethod
    def _divisor(self) -> float: ...


class AngularMap(_SimilarityMap):
    """½ + q̂·k̂/π, the linear-angular kernel of Castling-ViT (You et al. 2023, arXiv 2211.10526, section 4.1)."""

    name = "angular"

    def _direction(self, image: Tensor) -> Tensor:
        return functional.normalize(image, dim=-1)

    def _divisor(self) -> float:
        return math.pi


class BinaryMap(_SimilarityMap):
    """The share of equal signs, as in the binary attention of ShiftAddViT (You et al. 2023, arXiv 2306.06446, section
    4.2): the products of queries and keys need only additions.

    Gradients pass the sign as if it were tanh.
    """

    name = "binary"

    def _direction(self, image: Tensor) -> Tensor:
        soft = image.tanh()
        hard = torch.where(image >= 0, 1.0, -1.0)
        return soft + (hard - soft).detach()

    def _divisor(self) -> float:
        return 2.0 * self.heads.size


class WindowMap(FeatureMap):
    """Gives distant tokens no weight (StreamingLLM, Xiao et al. 2023, arXiv 2309.17453)."""

    name = "window"

    def __init__(self, heads: Heads) -> None:
        super().__init__(heads, 0)

    def queries(self, query: Tensor) -> tuple[Tensor, Tensor]:
        return query.new_zeros(*query.shape[:-1], 1).float(), self.keys(query)

    def keys(self, key: Tensor) -> Tensor:
        return key.new_zeros(*key.shape[:-1], 0).float()

    def start(self, query: Tensor, key: Tensor, scaling: float, generator: torch.Generator) -> None:
        """There is nothing to set."""


_KINDS = (ExponentialMap, AngularMap, BinaryMap, WindowMap)
_MAPS = {kind.name: kind for kind in _KINDS}


def make_map(name: str, heads: Heads) -> FeatureMap:
    """An empty map of this name, one of `MAP_TENSORS`."""
    return _MAPS[name](heads)


def k_means(points: Tensor, count: int, rounds: int, generator: torch.Generator) -> Tensor:
    """`count` centres `[count, size]` of `points` `[points, size]` after some rounds of Lloyd's algorithm. A centre
    that lost all of its points stays where it was."""
    picked = torch.randperm(len(points), generator=generator)[:count].to(points.device)
    centres = points[picked]
    if len(centres) < count:
        centres = centres.repeat(-(-count // len(centres)), 1)[:count]
    for _ in range(rounds):
        nearest = (points @ centres.T - centres.square().sum(1) / 2).argmax(1)
        sizes = torch.bincount(nearest, minlength=count)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
    return centres
