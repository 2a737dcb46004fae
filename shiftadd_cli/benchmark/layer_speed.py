"""Speed of single compressed layers and of dense layers of the same shape, with weights that are not in the cache."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from shiftadd_cli.artifact.contents import alike
from shiftadd_cli.bcq.weight import PackedLayout
from shiftadd_cli.benchmark.roof import Roof
from shiftadd_cli.benchmark.timing import Clock, Span, Timed, interleave
from shiftadd_cli.device import dtype_name
from shiftadd_cli.progress import progress
from shiftadd_cli.runtime.linear import PackedLinear
from shiftadd_cli.runtime.table import Int8Linear

ROWS = (1, 64)
COMPRESSED, DENSE = "compressed", (torch.float32, torch.bfloat16)

# Target duration of a sample: long enough to hide the cost of clock and loop, and short enough that all candidates run
# close together in time.
SAMPLE_SECONDS = 0.03
_MOST_CALLS = 10_000

# With more copies of a tiny layer, the benchmark would measure Python objects.
_MOST_COPIES = 1024
_MOST_BYTES = 1 << 30

Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LayerKind:
    """Layers of a model that differ only in their values.

    Attributes:
        names: names of the modules, with numbers of blocks replaced by `*`.
        layout: layout of the compressed matrix; None for a head of 8-bit rows.
        stored_bytes: bytes of one layer's weight.
    """

    names: tuple[str, ...]
    out_features: int
    in_features: int
    layout: PackedLayout | None
    stored_bytes: int
    modules: tuple[Any, ...]

    @property
    def form(self) -> str:
        """The storage format of the weight, in words."""
        if self.layout is None:
            return "8-bit rows"
        parts = [f"{self.layout.bits} bits", *self.layout.primitive.words(self.layout.scales)]
        parts += ["rotated"] * self.layout.rotation + ["offsets"] * self.layout.scales.offset
        parts += [f"{self.layout.outliers} outliers"] * (self.layout.outliers > 0)
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        return {
            "names": list(self.names),
            "count": len(self.modules),
            "out_features": self.out_features,
            "in_features": self.in_features,
            "form": self.form,
            "stored_bytes": self.stored_bytes,
            "bits_per_weight": 8 * self.stored_bytes / (self.out_features * self.in_features),
        }


@dataclass(frozen=True)
class WaySpeed:
    """One way to compute a layer.

    Attributes:
        name: `compressed`, or the dtype of a dense weight.
        weight_bytes: bytes that one call has to read.
        copies: copies of the weight that the calls cycle through; cold: whether together they exceed the last-level
            cache.
        calls: times by rows of the input; a span is one call.
    """

    name: str
    weight_bytes: int
    copies: int
    cold: bool
    calls: dict[int, Timed]

    def roof_share(self, roof: Roof, rows: int) -> float | None:
        """Share of the memory bandwidth reached by the median call, which reads the weight once; None if the weight may
        have been in the cache."""
        return roof.share(self.weight_bytes, self.calls[rows].seconds.median) if self.cold else None

    def to_dict(self, roof: Roof) -> dict[str, Any]:
        return {
            "weight_bytes": self.weight_bytes,
            "copies": self.copies,
            "cold": self.cold,
            "rows": {
                str(rows): timed.to_dict() | {"roof_share": self.roof_share(roof, rows)}
                for rows, timed in self.calls.items()
            },
        }


@dataclass(frozen=True)
class LayerSpeed:
    """Speeds of a kind of layer: compressed, and dense in each dtype; `dtype` is the compressed layer's input dtype."""

    kind: LayerKind
    dtype: str
    compressed: WaySpeed
    dense: tuple[WaySpeed, ...]

    def to_dict(self, roof: Roof) -> dict[str, Any]:
        gains = {
            way.name: {
                str(rows): timed.seconds.over(self.compressed.calls[rows].seconds).to_dict()
                for rows, timed in way.calls.items()
            }
            for way in self.dense
        }
        ways = {way.name: way.to_dict(roof) for way in (self.compressed, *self.dense)}
        return self.kind.to_dict() | {"dtype": self.dtype, "gains_over_dense": gains, "ways": ways}


def layer_kinds(model: nn.Module) -> list[LayerKind]:
    """The kinds of compressed linear layers in a model, in order of first appearance."""
    groups: dict[tuple[object, ...], list[tuple[str, PackedLinear | Int8Linear]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            groups.setdefault((module.layout, module.bias is None), []).append((name, module))
        elif isinstance(module, Int8Linear):
            groups.setdefault((module.out_features, module.in_features, module.bias is None), []).append((name, module))
    kinds = []
    for members in groups.values():
        first = members[0][1]
        layout = first.layout if isinstance(first, PackedLinear) else None
        stored = (
            first.layout.nbytes
            if isinstance(first, PackedLinear)
            else first.weight_int8.nbytes + first.weight_int8_scale.nbytes
        )
        kinds.append(
            LayerKind(
                names=tuple(dict.fromkeys(alike(name) for name, _ in members)),
                out_features=first.out_features,
                in_features=first.in_features,
                layout=layout,
                stored_bytes=stored,
                modules=tuple(module for _, module in members),
            )
        )
    return kinds


def copies_for(nbytes: int, cache_bytes: int, most_bytes: int) -> int:
    """Number of copies of a weight that fill twice the cache, within `most_bytes` of memory; at least 1."""
    count = -(-2 * cache_bytes // nbytes)
    return max(1, min(count, most_bytes // nbytes, _MOST_COPIES))


def measure_layers(
    kinds: Sequence[LayerKind],
    dtype: torch.dtype,
    *,
    rounds: int,
    cache_bytes: int,
    free_bytes: int,
    clock: Clock | None = None,
    show_progress: bool = True,
) -> list[LayerSpeed]:
    """Times of one call of every kind of layer on inputs of `dtype`, and of torch's linear on the decoded weight.

    Calls cycle through copies of the weight, so that no call finds its weight in the last-level cache of `cache_bytes`,
    as in a model, where all other layers run in between. The copies of a weight take at most 1 GiB or an eighth of
    `free_bytes`. A call of the compressed layer rotates its input, although layers of a model that read the same input
    may share the rotation.
    """
    clock = clock or Clock()
    most = min(_MOST_BYTES, free_bytes // 8)
    work: Iterable[LayerKind] = kinds
    if show_progress:
        work = progress(kinds, total=len(kinds), desc="Layers")
    return [_measure(kind, dtype, rounds, cache_bytes, most, clock) for kind in work]


def _measure(
    kind: LayerKind, dtype: torch.dtype, rounds: int, cache_bytes: int, most_bytes: int, clock: Clock
) -> LayerSpeed:
    def ring(layers: list[Layer], nbytes: int, kind_of_input: torch.dtype) -> Ring:
        return Ring(layers, nbytes, cold=len(layers) * nbytes > cache_bytes, dtype=kind_of_input)

    count = copies_for(kind.stored_bytes, cache_bytes, most_bytes)
    rings = {COMPRESSED: ring(_compressed_copies(kind, count), kind.stored_bytes, dtype)}
    weight, bias = kind.modules[0].decode(), kind.modules[0].bias
    for dense_dtype in DENSE:
        dense, dense_bias = weight.to(dense_dtype), None if bias is None else bias.to(dense_dtype)
        count = copies_for(dense.nbytes, cache_bytes, most_bytes)
        layers: list[Layer] = [partial(linear, weight=dense.clone(), bias=dense_bias) for _ in range(count)]
        rings[dtype_name(dense_dtype)] = ring(layers, dense.nbytes, dense_dtype)
    samples: dict[tuple[str, int], Callable[[], Span]] = {}
    for rows in ROWS:
        for name, way in rings.items():
            x = _input(rows, kind.in_features, way.dtype)
            samples[name, rows] = partial(way.sample, x, way.calls_for(x, clock), clock)
    spans = interleave(samples, rounds)
    speeds = {
        name: WaySpeed(
            name, way.nbytes, len(way.layers), way.cold, {rows: Timed(tuple(spans[name, rows])) for rows in ROWS}
        )
        for name, way in rings.items()
    }
    return LayerSpeed(kind, dtype_name(dtype), speeds.pop(COMPRESSED), tuple(speeds.values()))


class Ring:
    """Copies of one layer that are called in turn, over and over."""

    def __init__(self, layers: list[Layer], nbytes: int, *, cold: bool, dtype: torch.dtype) -> None:
        self.layers, self.nbytes, self.cold, self.dtype = layers, nbytes, cold, dtype
        self._next = 0

    def calls_for(self, x: Tensor, clock: Clock) -> int:
        """Calls per sample. On first use, every copy is called once beforehand, since layers may do one-time setup."""
        if self._next == 0:
            self.sample(x, len(self.layers), clock)
        seconds = self.sample(x, min(3, len(self.layers)), clock).wall
        return max(1, min(_MOST_CALLS, math.ceil(SAMPLE_SECONDS / seconds))) if seconds > 0 else _MOST_CALLS

    @torch.inference_mode()
    def sample(self, x: Tensor, calls: int, clock: Clock) -> Span:
        """Time of one call, the mean of the next `calls`."""
        order = [self.layers[(self._next + step) % len(self.layers)] for step in range(calls)]
        self._next += calls
        start = clock.now()
        for layer in order:
            layer(x)
        return (clock.now() - start) / calls


@torch.inference_mode()
def _input(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    # In inference mode, since layers that share a rotation do not cache it for such an input.
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)


def _compressed_copies(kind: LayerKind, count: int) -> list[Layer]:
    """The model's own layers first, which have separate weights anyway, then copies of the first layer."""
    own: list[Layer] = list(kind.modules[:count])
    return own + [copy.deepcopy(kind.modules[0]) for _ in range(count - len(own))]
