"""How long the integer program takes for a large model."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence

from shiftadd_cli.allocation.solve import LayerOptions, allocate

# Of a model of some 70 billion weights.
_HIDDEN, _KEYS, _WIDE, _GROUP = 8192, 1024, 28672, 128
_SHAPES = {
    "q": (_HIDDEN, _HIDDEN), "k": (_KEYS, _HIDDEN), "v": (_KEYS, _HIDDEN), "o": (_HIDDEN, _HIDDEN),
    "gate": (_WIDE, _HIDDEN), "up": (_WIDE, _HIDDEN), "down": (_HIDDEN, _WIDE),
}  # fmt: skip


def synthetic_layers(blocks: int, candidates: Sequence[int], seed: int = 0) -> list[LayerOptions]:
    """Seven linears a block with sensitivities spread over two orders of magnitude and errors of about 4^-bits."""
    draw = random.Random(seed)
    layers = []
    for block in range(blocks):
        for kind, (rows, columns) in _SHAPES.items():
            weight = math.exp(draw.gauss(0, 1.2))
            layers.append(
                LayerOptions(
                    f"{block}.{kind}",
                    {bits: rows * columns * bits // 8 + rows * columns // _GROUP * bits for bits in candidates},
                    {bits: weight * 4.0**-bits * math.exp(draw.gauss(0, 0.1)) for bits in candidates},
                )
            )
    return layers


def solver_seconds(layers: Sequence[LayerOptions], parts: Sequence[float]) -> tuple[float, ...]:
    """Wall-clock seconds of the choice at budgets that lie in these parts of the range, nothing tied."""
    low, high = (sum(choose(layer.bytes.values()) for layer in layers) for choose in (min, max))
    found = []
    for part in parts:
        start = time.monotonic()
        allocate(layers, [], round(low + part * (high - low)))
        found.append(time.monotonic() - start)
    return tuple(found)
