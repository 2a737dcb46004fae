"""Times the integer program for a large model."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence

from shiftadd_cli.allocation.solve import LayerOptions, allocate

# Shapes of a model with about 70 billion weights.
_HIDDEN, _KEYS, _WIDE, _GROUP = 8192, 1024, 28672, 128
_SHAPES = {
    "q": (_HIDDEN, _HIDDEN), "k": (_KEYS, _HIDDEN), "v": (_KEYS, _HIDDEN), "o": (_HIDDEN, _HIDDEN),
    "gate": (_WIDE, _HIDDEN), "up": (_WIDE, _HIDDEN), "down": (_HIDDEN, _WIDE),
}  # fmt: skip


def synthetic_layers(blocks: int, candidates: Sequence[int], seed: int = 0) -> list[LayerOptions]:
    """Seven linears per block with sensitivities spread over two orders of magnitude and errors of about 4^-bits."""
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
    """Wall-clock seconds of the choice at budgets in these parts of the range, without tied layers."""
    low, high = (sum(choose(layer.bytes.values()) for layer in layers) for choose in (min, max))
    seconds = []
    for part in parts:
        start = time.monotonic()
        allocate(layers, [], round(low + part * (high - low)))
        seconds.append(time.monotonic() - start)
    return tuple(seconds)
