"""Which blocks the kernels support, and when a plan is out of date."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from artifacts import random_weight
from compiled import needs_kernels
from formats import matrix_format
from torch import nn

from shiftadd_cli.bcq.weight import PackedLayout
from shiftadd_cli.kernels.select import Precision
from shiftadd_cli.runtime.fused_decode.block_plan import LINEARS, NORMS, BlockPlan, Form, suits
from shiftadd_cli.runtime.linear import PackedLinear

pytestmark = needs_kernels
FORM = Form(heads=4, key_heads=2, head_size=6, scale=0.4)
SHAPES = {
    "q_proj": (24, 20),
    "k_proj": (12, 20),
    "v_proj": (12, 20),
    "o_proj": (20, 24),
    "gate_proj": (50, 20),
    "up_proj": (50, 20),
    "down_proj": (20, 50),
}


class Norm(nn.Module):
    def __init__(self, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(columns))


def packed(rows: int, columns: int, *, outliers: bool = False) -> PackedLinear:
    form = matrix_format(bits=2, rotation="hadamard", outlier_columns=0.1 if outliers else 0.0)
    layout = PackedLayout(form, rows, columns)
    linear = PackedLinear.from_weight(random_weight(layout), torch.zeros(rows))
    linear.prepare()
    return linear


@pytest.fixture
def linears() -> dict[str, Any]:
    return {name: packed(*SHAPES[name]) for name in LINEARS}


@pytest.fixture
def norms() -> dict[str, Any]:
    return dict.fromkeys(NORMS) | {"before_attention": Norm(20), "before_mlp": Norm(20)}


def test_block_of_matching_sizes_is_supported(linears: dict[str, Any], norms: dict[str, Any]) -> None:
    assert suits(linears, norms, FORM)


@pytest.mark.parametrize("change", ["dense", "unprepared", "outliers", "precision", "shape", "meta"])
def test_other_blocks_are_not_supported(linears: dict[str, Any], norms: dict[str, Any], change: str) -> None:
    if change == "dense":
        linears["up_proj"] = nn.Linear(20, 50)
    elif change == "unprepared":
        linears["o_proj"].restore()
    elif change == "outliers":
        linears["down_proj"] = packed(20, 50, outliers=True)
    elif change == "precision":
        linears["v_proj"].precision = Precision.EXACT
    elif change == "shape":
        linears["up_proj"] = packed(48, 20)
    else:
        norms["before_attention"].to("meta")
    assert not suits(linears, norms, FORM)


@pytest.mark.parametrize("sizes", [{"key_heads": 0}, {"key_heads": 3, "head_size": 4}, {"heads": 8, "head_size": 3}])
def test_heads_must_fit(linears: dict[str, Any], norms: dict[str, Any], sizes: dict[str, Any]) -> None:
    assert not suits(linears, norms, replace(FORM, **sizes))


def test_plan_holds_until_something_changes(linears: dict[str, Any], norms: dict[str, Any]) -> None:
    holder: dict[str, nn.Module] = {**linears, **{name: norm for name, norm in norms.items() if norm is not None}}
    plan = BlockPlan(linears, norms, FORM, [(holder, name) for name in holder])
    assert plan.watch.holds()
    assert not plan.watch.is_heard()
    hook = linears["k_proj"].register_forward_hook(lambda *_: None)
    assert plan.watch.is_heard()
    hook.remove()
    assert not plan.watch.is_heard()
    linears["k_proj"].forward = linears["q_proj"].forward
    assert plan.watch.is_heard()
    holder["gate_proj"] = linears["up_proj"]
    assert not plan.watch.holds()
    holder["gate_proj"] = linears["gate_proj"]
    assert plan.watch.holds()
    linears["down_proj"].prepare()
    assert not plan.watch.holds()
