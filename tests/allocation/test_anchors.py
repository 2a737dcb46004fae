"""Estimates are scaled to measured losses, kind by kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import save_tiny

from shiftadd_cli.allocation.anchors import anchored, choose_anchors
from shiftadd_cli.bcq.choices import Choice
from shiftadd_cli.source import LinearSpec, find_structure, open_source


def specs(blocks: int, experts: int = 0) -> list[LinearSpec]:
    kinds = ["attn.q", "mlp.up", *(f"mlp.experts.{number}.down" for number in range(experts))]
    return [
        LinearSpec(f"layers.{block}.{kind}", kind, block, 4, 4, has_bias=False, transposed=False)
        for block in range(blocks)
        for kind in kinds
    ]


@given(blocks=st.integers(1, 40), experts=st.integers(0, 5))
def test_anchors_of_each_kind_come_from_all_depths(blocks: int, experts: int) -> None:
    linears = specs(blocks, experts)
    chosen = choose_anchors(linears)
    depths = [spec.block for spec in linears if spec.name in chosen and spec.kind == "attn.q"]
    assert len(depths) == min(3, blocks)
    # They are in the middle of equal parts of the depth.
    for index, depth in enumerate(depths):
        assert abs(depth + 0.5 - blocks * (2 * index + 1) / (2 * len(depths))) <= 0.5
    # Experts are one kind.
    expert_anchors = [spec for spec in linears if spec.name in chosen and "experts" in spec.kind]
    assert len(expert_anchors) == min(3, blocks * experts)


positive = st.floats(1e-6, 1e3)


@given(
    estimates=st.lists(st.tuples(positive, positive), min_size=12, max_size=12), factors=st.tuples(positive, positive)
)
def test_a_constant_factor_per_kind_is_corrected(
    estimates: list[tuple[float, float]], factors: tuple[float, float]
) -> None:
    linears = specs(6)
    costs: dict[str, dict[Choice, float]] = {
        spec.name: {2: two, 3: three} for spec, (two, three) in zip(linears, estimates, strict=True)
    }
    factor = {"attn.q": factors[0], "mlp.up": factors[1]}
    chosen = choose_anchors(linears)
    measured: dict[str, dict[Choice, float]] = {
        spec.name: {2: costs[spec.name][2] * factor[spec.kind]} for spec in linears if spec.name in chosen
    }
    corrected = anchored(costs, costs, measured, linears)
    for spec in linears:
        for bits, cost in costs[spec.name].items():
            assert corrected[spec.name][bits] == pytest.approx(cost * factor[spec.kind], rel=1e-9)


def test_kinds_without_a_measured_loss_take_the_factor_of_the_others() -> None:
    linears = specs(4)
    costs: dict[str, dict[Choice, float]] = {spec.name: {2: 1.0} for spec in linears}
    measured: dict[str, dict[Choice, float]] = {"layers.0.attn.q": {2: 3.0}, "layers.1.mlp.up": {2: 0.0}}
    assert {by_bits[2] for by_bits in anchored(costs, costs, measured, linears).values()} == {3.0}
    assert anchored(costs, {}, {}, linears) == costs


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_anchors_of_a_model_are_few_and_in_different_blocks(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path)
    linears = find_structure(open_source(str(tmp_path)).skeleton()).linears
    chosen = [spec for spec in linears if spec.name in choose_anchors(linears)]
    blocks = 1 + max(spec.block for spec in linears)
    attention = [spec for spec in chosen if spec.kind.endswith("q_proj")]
    assert len(attention) == min(3, blocks)
    assert len(chosen) < len(linears) or not any(spec.experts for spec in linears)
    assert torch.tensor([spec.block for spec in attention]).unique().numel() == len(attention)
