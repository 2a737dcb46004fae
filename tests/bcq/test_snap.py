from __future__ import annotations

import itertools

import pytest
import torch
from bcq_problems import generator, quick, random_spd
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shiftadd_cli.bcq.scale_formats import scale_format
from shiftadd_cli.bcq.snap import SnappedScales, matrix_scale, snap_scales

SUMS = ("pot", "apot2", "apot3")


def targets(rows: int, groups: int, bits: int, offset: bool, seed: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """Scales, offsets, and curvatures far from diagonal."""
    g = generator(seed)
    scales = torch.exp2(-3 * torch.rand(rows, groups, bits, generator=g)) * torch.rand(rows, 1, 1, generator=g)
    offsets = 0.3 * scales.amax(-1) * torch.randn(rows, groups, generator=g) if offset else None
    return scales, offsets, random_spd(bits + offset, seed, (rows, groups))


def cost(snapped: SnappedScales, scales: Tensor, offsets: Tensor | None, curvature: Tensor) -> Tensor:
    """(x̂ − x)ᵀ M (x̂ − x) of each group, float64."""
    moved = snapped.scales().double() - scales.double()
    if offsets is not None:
        stored = snapped.offset_values()
        assert stored is not None
        moved = torch.cat((moved, (stored.double() - offsets.double()).unsqueeze(-1)), dim=-1)
    return ((curvature.double() @ moved.unsqueeze(-1)).squeeze(-1) * moved).sum(-1)


def check_representable(snapped: SnappedScales, name: str) -> None:
    form = scale_format(name)
    assert torch.equal(snapped.row_scale, snapped.row_scale.bfloat16().float())
    if name == "float":
        assert torch.equal(snapped.ratios, snapped.ratios.half().float())
        assert (snapped.ratios >= 0).all()
    else:
        assert torch.isin(snapped.ratios, form.values).all()
    if snapped.offsets is None:
        return
    if name == "float":
        assert torch.equal(snapped.offsets, snapped.offsets.half().float())
    else:
        eighths = snapped.offsets * 8
        unit = snapped.ratios.amax(-1)
        multiples = torch.where(unit > 0, eighths / unit, 0.0).round().clamp(-8, 7)
        assert torch.equal(multiples * unit, eighths)


problems = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.booleans(), st.integers(0, 999))


@pytest.mark.parametrize("name", [*SUMS, "float"])
@quick
@given(problem=problems, fixed=st.sampled_from([None, "matrix", "rows"]))
def test_results_are_representable(name: str, problem: tuple[int, int, int, bool, int], fixed: str | None) -> None:
    scales, offsets, curvature = targets(*problem)
    row_scale = {None: None, "matrix": torch.tensor([0.5]), "rows": torch.full((problem[0],), 0.75)}[fixed]
    snapped = snap_scales(scales, offsets, curvature, scale_format(name), fixed_row_scale=row_scale)
    check_representable(snapped, name)
    if row_scale is not None:
        assert torch.equal(snapped.row_scale, row_scale)
    else:
        assert snapped.row_scale.shape == (problem[0],)


@pytest.mark.parametrize("name", SUMS)
@quick
@given(problem=problems)
def test_snapping_costs_no_more_than_separate_rounding(name: str, problem: tuple[int, int, int, bool, int]) -> None:
    scales, offsets, curvature = targets(*problem)
    form = scale_format(name)
    snapped = snap_scales(scales, offsets, curvature, form)
    unit = snapped.row_scale.view(-1, 1, 1)
    ratios = form.round(scales / unit)
    alone_offsets = None
    if offsets is not None:
        step = ratios.amax(-1) / 8
        alone_offsets = (offsets / unit.squeeze(-1) / step).nan_to_num(0, 0, 0).round().clamp(-8, 7) * step
    alone = SnappedScales(ratios, alone_offsets, snapped.row_scale)
    together = cost(snapped, scales, offsets, curvature)
    assert (together <= cost(alone, scales, offsets, curvature) * (1 + 1e-3) + 1e-9).all()


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("name", SUMS)
def test_no_single_scale_can_improve(name: str, bits: int) -> None:
    # With many groups, separate rounding beats descent from the optimum in a few of them.
    scales, _, curvature = targets(60, 8, bits, False, seed=bits)
    form = scale_format(name)
    snapped = snap_scales(scales, None, curvature, form)
    reached = cost(snapped, scales, None, curvature)
    values = form.values if len(form.values) < 300 else form.values[:: len(form.values) // 300]
    for plane, value in itertools.product(range(bits), values):
        ratios = snapped.ratios.clone()
        ratios[..., plane] = value
        other = cost(SnappedScales(ratios, None, snapped.row_scale), scales, None, curvature)
        assert (reached <= other * (1 + 1e-3) + 1e-9).all()


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_no_single_offset_can_improve(bits: int) -> None:
    scales, offsets, curvature = targets(6, 4, bits, True, seed=bits)
    snapped = snap_scales(scales, offsets, curvature, scale_format("apot2"))
    reached = cost(snapped, scales, offsets, curvature)
    # A stored offset is the best of the sixteen for its scales, or no worse than the plain rounding that it beat.
    for multiple in range(-8, 8):
        other = SnappedScales(snapped.ratios, multiple / 8 * snapped.ratios.amax(-1), snapped.row_scale)
        assert (reached <= cost(other, scales, offsets, curvature) * (1 + 1e-3) + 1e-9).all()


def test_the_joint_choice_is_close_to_the_best_of_all() -> None:
    scales, _, curvature = targets(20, 1, 3, False, seed=5)
    form = scale_format("pot")
    snapped = snap_scales(scales, None, curvature, form)
    reached = cost(snapped, scales, None, curvature)
    best = torch.full_like(reached, torch.inf)
    for choice in itertools.product(form.values[-8:], repeat=3):
        ratios = torch.stack(choice).expand(20, 1, 3)
        best = torch.minimum(best, cost(SnappedScales(ratios, None, snapped.row_scale), scales, None, curvature))
    alone = SnappedScales(form.round(scales / snapped.row_scale.view(-1, 1, 1)), None, snapped.row_scale)
    assert reached.sum() < 2 * best.sum()
    assert reached.sum() < 0.7 * cost(alone, scales, None, curvature).sum()


@pytest.mark.parametrize(("name", "factor"), [("pot", 1.15), ("apot2", 2.0), ("apot3", 3.0)])
@pytest.mark.parametrize("offset", [False, True])
def test_row_scale_is_nearly_the_best_of_its_octave(name: str, factor: float, offset: bool) -> None:
    # A finer format has a lower and more rugged cost, and the best row scale gains less.
    scales, offsets, curvature = targets(40, 4, 3, offset, seed=9)
    form = scale_format(name)
    reached = cost(snap_scales(scales, offsets, curvature, form), scales, offsets, curvature).sum(1)
    costs_by_step = []
    for step in range(32):
        row_scale = (scales.amax((1, 2)) * 2.0 ** (step / 32 - 0.5)).bfloat16().float()
        other = snap_scales(scales, offsets, curvature, form, fixed_row_scale=row_scale)
        costs_by_step.append(cost(other, scales, offsets, curvature).sum(1))
    costs = torch.stack(costs_by_step)
    assert reached.sum() < costs.mean(0).sum()
    assert reached.sum() < factor * costs.amin(0).sum()


def test_representable_scales_are_kept() -> None:
    ratios = torch.tensor([[[1.0, 0.5, 0.25], [0.75, 0.3125, 0.0]]])
    curvature = random_spd(3, 1, (1, 2))
    snapped = snap_scales(ratios, None, curvature, scale_format("apot2"), fixed_row_scale=torch.ones(1))
    assert torch.equal(snapped.ratios, ratios)


@pytest.mark.parametrize("name", [*SUMS, "float"])
@pytest.mark.parametrize("offset", [False, True])
def test_zero_scales_and_singular_curvature_stay_finite(name: str, offset: bool) -> None:
    scales = torch.zeros(2, 3, 2)
    scales[1, 0] = torch.tensor([0.5, 0.5])
    offsets = torch.tensor([[0.0, 5.0, 1e-20], [1.0, 0.0, 0.0]]) if offset else None
    snapped = snap_scales(scales, offsets, torch.ones(2, 3, 2 + offset, 2 + offset), scale_format(name))
    check_representable(snapped, name)
    assert torch.isfinite(snapped.scales()).all()
    assert not snapped.ratios[0].any()


def test_where_selects_rows() -> None:
    first = SnappedScales(torch.ones(3, 2, 1), torch.ones(3, 2), torch.tensor([1.0, 2.0, 4.0]))
    other = SnappedScales(torch.zeros(3, 2, 1), torch.zeros(3, 2), torch.tensor([8.0, 8.0, 8.0]))
    mixed = first.where(torch.tensor([True, False, True]), other)
    assert mixed.ratios[:, 0, 0].tolist() == [1.0, 0.0, 1.0]
    assert mixed.row_scale.tolist() == [1.0, 8.0, 4.0]
    assert mixed.offsets is not None
    assert mixed.offsets[:, 1].tolist() == [1.0, 0.0, 1.0]
    shared = SnappedScales(first.ratios, None, torch.ones(1))
    assert shared.where(torch.tensor([True, False, True]), shared).row_scale.tolist() == [1.0]


@quick
@given(st.floats(2**-99, 2**30, width=32))
def test_matrix_scale_is_the_least_power_of_two_not_below_any_weight(largest: float) -> None:
    scale = float(matrix_scale(torch.tensor([[0.0, -largest]])))
    assert scale / 2 < largest <= scale
    assert torch.tensor(scale).bfloat16() == scale
    assert float(torch.tensor(scale).log2()) % 1 == 0


def test_matrix_scale_of_powers_of_two_and_their_neighbours() -> None:
    for exponent in range(-20, 20):
        power = torch.tensor([[2.0**exponent]])
        assert matrix_scale(power).tolist() == [2.0**exponent]
        above = torch.nextafter(power, torch.tensor(torch.inf))
        assert matrix_scale(above).tolist() == [2.0 ** (exponent + 1)]
    assert matrix_scale(torch.zeros(2, 2)).item() > 0
