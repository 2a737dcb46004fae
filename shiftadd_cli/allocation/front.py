"""Predicted loss versus size for a given plan: uniform bits, and a lower bound on all plans."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

from shiftadd_cli.allocation.knapsack import lower_hull
from shiftadd_cli.allocation.plan_file import BitPlan, PlannedLayer

# Maximum number of points of a bound; a large model's bound has a thousand corners.
_MOST_POINTS = 60


class SizePoint(NamedTuple):
    """Bytes of the quantized layers and their predicted loss, in the unit of the sensitivity."""

    nbytes: int
    predicted_loss: float


def uniform_points(plan: BitPlan) -> dict[int, SizePoint]:
    """Size and loss with equal bits for all layers, for the bits that every layer allows."""
    layers = list(plan.layers.values())
    return {
        bits: SizePoint(sum(layer.bytes[bits] for layer in layers), math.fsum(layer.cost[bits] for layer in layers))
        for bits in range(1, 9)
        if all(bits in layer.bytes for layer in layers)
    }


def lower_bound(plan: BitPlan) -> list[SizePoint]:
    """Corners of the lower convex hull of all choices of bits, by increasing size; ties between layers are ignored.

    This is the Lagrangian relaxation of the plan's integer program: steps of single layers, each along the hull of its
    own choices, ordered by the gain per byte. Every corner is an actual choice of bits.
    """
    hulls = [_hull(layer) for layer in plan.layers.values()]
    steps = [(start, stop) for hull in hulls for start, stop in pairwise(hull)]
    steps.sort(key=lambda step: (step[1].predicted_loss - step[0].predicted_loss) / (step[1].nbytes - step[0].nbytes))
    size, loss = sum(hull[0].nbytes for hull in hulls), math.fsum(hull[0].predicted_loss for hull in hulls)
    corners = [SizePoint(size, loss)]
    for start, stop in steps:
        size, loss = size + stop.nbytes - start.nbytes, loss + stop.predicted_loss - start.predicted_loss
        corners.append(SizePoint(size, loss))
    stride = max(1, -(-(len(corners) - 1) // _MOST_POINTS))
    thinned = corners[::stride]
    return thinned if thinned[-1] == corners[-1] else [*thinned, corners[-1]]


def _hull(layer: PlannedLayer) -> list[SizePoint]:
    """Choices of one layer that are optimal at some price per byte, by increasing size and decreasing loss."""
    corners = lower_hull((layer.bytes[choice], layer.cost[choice]) for choice in layer.bytes)
    return [SizePoint(int(nbytes), loss) for nbytes, loss in corners]
