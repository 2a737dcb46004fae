from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, product

import pytest
from bit_plans import plan_for
from tiny_models import save_tiny

from shiftadd_cli.allocation.front import lower_bound, uniform_points
from shiftadd_cli.allocation.plan_file import BitPlan
from shiftadd_cli.recipe import Recipe


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> BitPlan:
    full = plan_for(save_tiny("llama", tmp_path_factory.mktemp("front") / "model"), Recipe.load("equal-bits"))
    layers = {
        name: layer.model_copy(update={"cost": {2: 0.1 + 0.03 * index, 3: 0.02 + 0.03 * (index % 3), 4: 0.01}})
        for index, (name, layer) in enumerate(list(full.layers.items())[:6])
    }
    return full.model_copy(update={"layers": layers})


def choices(plan: BitPlan) -> Iterator[tuple[int, float]]:
    """Size and loss of every choice of bits."""
    layers = list(plan.layers.values())
    for bits in product(*(layer.bytes for layer in layers)):
        yield (
            sum(layer.bytes[choice] for layer, choice in zip(layers, bits, strict=True)),
            sum(layer.cost[choice] for layer, choice in zip(layers, bits, strict=True)),
        )


def test_no_choice_lies_below_the_bound_and_its_corners_are_choices(plan: BitPlan) -> None:
    corners, points = lower_bound(plan), sorted(choices(plan))
    assert len(corners) > 2
    for corner in corners:
        assert any(size == corner.nbytes and loss == pytest.approx(corner.predicted_loss) for size, loss in points)
    for left, right in pairwise(corners):
        assert left.nbytes < right.nbytes
        slope = (right.predicted_loss - left.predicted_loss) / (right.nbytes - left.nbytes)
        assert slope < 0
        for size, loss in points:
            if left.nbytes <= size <= right.nbytes:
                assert loss >= left.predicted_loss + slope * (size - left.nbytes) - 1e-12
    assert corners[0].nbytes == points[0][0]
    assert corners[-1].predicted_loss == pytest.approx(min(loss for _, loss in points))


def test_uniform_points_have_bits_that_all_layers_allow(plan: BitPlan) -> None:
    points = uniform_points(plan)
    assert list(points) == [2, 3, 4]
    assert points[4].predicted_loss == pytest.approx(0.06)
    name, layer = next(iter(plan.layers.items()))
    fewer = layer.model_copy(update={"bits": 2, "bytes": {2: 5}, "cost": {2: 0.5}})
    assert list(uniform_points(plan.model_copy(update={"layers": plan.layers | {name: fewer}}))) == [2]
