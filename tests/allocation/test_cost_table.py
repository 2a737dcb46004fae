"""Measured costs of layers: tables are read or refused, and the best choice within a limit is found."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from shiftadd_cli.allocation.cost_table import CostLimit, CostTable, load_cost_table, parse_budget
from shiftadd_cli.allocation.solve import LayerOptions, allocate
from shiftadd_cli.bcq.choices import Choice
from shiftadd_cli.errors import AllocationError

HEAD = {"format": "shiftadd cost table", "version": 1, "cost": "latency", "unit": "ms"}
MEASURED = [{"shape": [4, 8], "bits": 2, "cost": 0.5}, {"shape": [4, 8], "bits": 3, "cost": 0.75}]


def table(**values: Any) -> CostTable:
    return CostTable.model_validate(HEAD | values)


def test_costs_per_weight_and_of_measured_shapes_are_read() -> None:
    per_weight = table(per_weight={"2": 0.25, "3": 0.5})
    assert per_weight.of("layer", (4, 8), 3) == 16.0
    measured = table(measured=MEASURED)
    assert measured.of("layer", (4, 8), 3) == 0.75
    with pytest.raises(AllocationError, match=r"no latency of 4 bits, which blocks\.0\.up may get"):
        per_weight.of("blocks.0.up", (4, 8), 4)
    # A transposed matrix has another shape.
    with pytest.raises(AllocationError, match=r"no latency of the shape 8 x 4 at 2 bits, which blocks\.0\.up may"):
        measured.of("blocks.0.up", (8, 4), 2)


def test_shift_layers_have_costs_under_their_words() -> None:
    per_weight = table(per_weight={"2": 0.25, "shift2": 0.5})
    assert per_weight.of("layer", (4, 8), "shift2-4") == 16.0
    measured = table(measured=[*MEASURED, {"shape": [4, 8], "bits": "shift1-2", "cost": 0.125}])
    assert measured.of("layer", (4, 8), "shift1-2") == 0.125
    with pytest.raises(AllocationError, match=r"no latency of shift1-3, which blocks\.0\.up may get"):
        per_weight.of("blocks.0.up", (4, 8), "shift1-3")
    with pytest.raises(ValueError, match="shift1-2 is given twice"):
        table(measured=[{"shape": [4, 8], "bits": "shift1-2", "cost": cost} for cost in (1.0, 2.0)])


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_the_best_within_the_limit(seed: int) -> None:
    """All choices are tried. Costs are not round numbers and do not grow with the bits."""
    rng = random.Random(seed)
    shapes = {f"layer{index}": (index + 1, 3) for index in range(6)}
    measured = [
        {"shape": list(shape), "bits": bits, "cost": rng.uniform(1e-7, 1e-5)}
        for shape in shapes.values()
        for bits in (2, 3, 4)
    ]
    costs = table(measured=measured)
    layers = [LayerOptions(name, {2: 2, 3: 3, 4: 4}, {bits: rng.random() for bits in (2, 3, 4)}) for name in shapes]
    assignments = [dict(zip(shapes, bits, strict=True)) for bits in itertools.product((2, 3, 4), repeat=6)]
    totals = [CostLimit(costs, 1.0).spent(bits, shapes) for bits in assignments]
    for share in (0.0, 0.2, 0.6):
        limit = CostLimit(costs, min(totals) + share * (max(totals) - min(totals)))
        limit.check(dict.fromkeys(shapes, (2, 3, 4)), shapes)
        chosen = allocate([limit.priced(layer, shapes[layer.name]) for layer in layers], [], limit.steps)
        assert limit.spent(chosen, shapes) <= limit.limit * (1 + 2e-6)

        def loss(bits: Mapping[str, Choice]) -> float:
            return sum(layer.costs[bits[layer.name]] for layer in layers)

        best = min(loss(bits) for bits, total in zip(assignments, totals, strict=True) if total <= limit.limit)
        assert loss(chosen) <= best + 1e-9


def test_an_unreachable_limit_is_refused_with_the_range() -> None:
    costs, shapes = table(measured=MEASURED), {"a": (4, 8), "b": (4, 8)}
    allowed = {"a": (2, 3), "b": (3,)}
    CostLimit(costs, 1.25).check(allowed, shapes)
    with pytest.raises(AllocationError, match=r"1\.2 ms of latency cannot be met.* from 1\.25 to 1\.5 ms"):
        CostLimit(costs, 1.2).check(allowed, shapes)


FAULTY = [
    ("{", "not valid JSON"),
    ("[]", "not a cost table"),
    (json.dumps({**HEAD, "format": "other"}), "not a cost table"),
    (json.dumps({**HEAD, "version": 2, "measured": MEASURED}), "version"),
    (json.dumps(HEAD), "one of per_weight and measured"),
    (json.dumps({**HEAD, "measured": MEASURED, "per_weight": {"2": 1}}), "one of per_weight and measured"),
    (json.dumps({**HEAD, "measured": [*MEASURED, MEASURED[0]]}), "given twice"),
    (json.dumps({**HEAD, "measured": [{**MEASURED[0], "cost": -1}]}), "measured, 0, cost"),
    (json.dumps({**HEAD, "per_weight": {"9": 1}}), "per_weight"),
    (json.dumps({**HEAD, "per_weight": {"2": float("nan")}}), "per_weight"),
    (json.dumps({**HEAD, "measured": MEASURED, "units": "s"}), "units"),
]


@pytest.mark.parametrize(("text", "message"), FAULTY)
def test_a_faulty_table_is_refused_in_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(AllocationError, match=message) as caught:
        load_cost_table(path)
    assert str(path) in str(caught.value)


def test_a_table_of_another_cost_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({**HEAD, "measured": MEASURED}))
    with pytest.raises(AllocationError, match="is of latency"):
        parse_budget(None, None, None, "energy", path, 3.0)
    assert parse_budget(None, None, None, "latency", path, 3.0).text == "3 ms of latency"
    with pytest.raises(AllocationError, match="`max_cost`"):
        parse_budget(None, None, None, "latency", path, 0.0)
