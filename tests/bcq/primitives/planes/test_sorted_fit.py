from __future__ import annotations

from typing import Any

import pytest
import torch
from bcq_problems import generator, nearest_planes, quick
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shiftadd_cli.bcq.primitives.planes import fit as fit_module
from shiftadd_cli.bcq.primitives.planes.fit import GroupFit, fit_groups
from shiftadd_cli.bcq.primitives.planes.initial_scales import Scales
from shiftadd_cli.bcq.primitives.planes.sorted_fit import SortedGroup, SortedGroups, fit_sorted
from shiftadd_cli.bcq.scale_formats import scale_format

FORMATS = (None, "pot", "apot2", "apot3", "float")


def group(seed: int, size: int) -> tuple[Tensor, Tensor]:
    """Weights within ±1 and importance, some of it zero, `[size]`."""
    g = generator(seed)
    importance = torch.rand(size, generator=g) ** 3
    return torch.randn(size, generator=g).clamp(-4, 4) / 4, torch.where(importance < 0.01, 0.0, importance)


def one_group(weights: Tensor, importance: Tensor) -> SortedGroup:
    return SortedGroup(SortedGroups(weights.unsqueeze(0), importance.unsqueeze(0)), 0)


@quick
@given(bits=st.integers(1, 5), seed=st.integers(0, 999), size=st.integers(1, 200))
def test_sums_over_intervals_are_sums_over_weights(bits: int, seed: int, size: int) -> None:
    weights, importance = group(seed, size)
    scales = torch.rand(bits, generator=generator(seed)).tolist()
    problem = one_group(weights, importance)
    matrix, rhs = problem.normal_equations(scales)
    planes, values = nearest_planes(weights, scales)
    h, w = importance.double(), weights.double()
    torch.testing.assert_close(torch.tensor(matrix, dtype=torch.float64), (planes * h) @ planes.T)
    torch.testing.assert_close(torch.tensor(rhs, dtype=torch.float64), (planes * h) @ w)
    assert problem.error(scales, matrix, rhs) == pytest.approx(float(((w - values).square() * h).sum()), abs=1e-12)


def test_a_weight_on_a_midpoint_goes_to_the_lower_level() -> None:
    weights = torch.tensor([-0.5, 0.0, 0.5])
    matrix, rhs = one_group(weights, torch.tensor([1.0, 2.0, 4.0])).normal_equations([0.5, 0.25])
    # Levels ±0.25 and ±0.75 with midpoints on all three weights: ranks 0, 1, 2.
    planes = torch.tensor([[-1.0, -1.0, 1.0], [-1.0, 1.0, -1.0]])
    weighted = planes * torch.tensor([1.0, 2.0, 4.0])
    assert matrix == (weighted @ planes.T).tolist()
    assert rhs == (weighted @ weights).tolist()


@pytest.mark.parametrize("name", FORMATS)
@quick
@given(
    bits=st.integers(1, 3),
    rounds=st.integers(0, 20),
    count=st.integers(1, 4),
    seed=st.integers(0, 999),
    size=st.integers(60, 200),
)
def test_fitting_one_by_one_is_as_good_as_all_at_once(
    name: str | None, bits: int, rounds: int, count: int, seed: int, size: int
) -> None:
    pairs = [group(seed + i, size) for i in range(count)]
    weights, importance = torch.stack([w for w, _ in pairs]), torch.stack([h for _, h in pairs])
    options: dict[str, Any] = {
        "method": "greedy",
        "rounds": rounds,
        "rounding": None if name is None else scale_format(name),
    }
    scales, _ = fit_sorted(weights, importance, bits, rounds, options["rounding"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit_module, "_FEW_GROUPS", 0)
        together = fit_groups(weights, importance, bits, **options)
    for i in range(count):
        energy = float((weights[i].square() * importance[i]).sum())
        error, expected = (
            float(((weights[i] - nearest_planes(weights[i], s[i].tolist())[1]).square() * importance[i]).sum())
            for s in (scales, together.scales)
        )
        # Where a weight lies on a midpoint, the last digit decides which minimum the rounds end in.
        assert error <= 1.2 * expected + 1e-4 * energy


def test_few_groups_are_fitted_one_by_one() -> None:
    weights, importance = torch.stack([group(seed, 700)[0] for seed in range(3)]), torch.ones(3, 700)
    form = scale_format("apot3")
    fit = fit_groups(weights, importance, 3, method="greedy", rounds=20, rounding=form)
    assert isinstance(fit, GroupFit)
    scales, curvature = fit_sorted(weights, importance, 3, 20, form)
    assert torch.equal(fit.scales, scales)
    assert torch.equal(fit.curvature, curvature)
    assert fit.offsets is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit_module, "_FEW_GROUPS", 0)
        together = fit_groups(weights, importance, 3, method="greedy", rounds=20, rounding=form)
    torch.testing.assert_close(together.scales, scales)


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_zero_weights_give_zero_scales(bits: int) -> None:
    nothing = torch.zeros(2, 5)
    importance = torch.tensor([[0.0] * 5, [1.0] * 5])
    scales, curvature = fit_sorted(nothing, importance, bits, 20, scale_format("apot3"))
    assert not scales.any()
    assert torch.isfinite(curvature).all()


@quick
@given(
    bits=st.integers(1, 5),
    offset=st.booleans(),
    count=st.integers(1, 4),
    size=st.integers(1, 100),
    seed=st.integers(0, 999),
)
def test_sums_over_intervals_of_all_groups_are_sums_over_weights(
    bits: int, offset: bool, count: int, size: int, seed: int
) -> None:
    g = generator(seed)
    weights, scales = torch.randn(count, size, generator=g), torch.rand(count, bits, generator=g)
    importance = torch.rand(count, size, generator=g) - 0.1
    importance = importance.clamp_min(0)
    offsets = torch.randn(count, generator=g) if offset else None
    sums = SortedGroups(weights, importance).normal_equations(Scales(scales, offsets))
    for i in range(count):
        planes, values = nearest_planes(weights[i], scales[i].tolist(), 0.0 if offsets is None else float(offsets[i]))
        terms = torch.cat((planes, torch.ones(int(offset), size, dtype=torch.float64)))
        h, w = importance[i].double(), weights[i].double()
        torch.testing.assert_close(sums.matrix[i].double(), (terms * h) @ terms.T, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sums.rhs[i].double(), (terms * h) @ w, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sums.error[i], ((w - values).square() * h).sum(), rtol=1e-5, atol=1e-6)


def test_a_weight_on_a_midpoint_of_its_group_goes_to_the_lower_level() -> None:
    weights, importance = torch.tensor([[0.5, 0.0, -0.5]]), torch.tensor([[4.0, 2.0, 1.0]])
    # Levels ±0.25 and ±0.75, with midpoints on all three weights.
    sums = SortedGroups(weights, importance).normal_equations(Scales(torch.tensor([[0.5, 0.25]]), None))
    planes = torch.tensor([[1.0, -1.0, -1.0], [-1.0, 1.0, -1.0]])
    assert torch.equal(sums.matrix[0], (planes * importance) @ planes.T)
    assert torch.equal(sums.rhs[0], (planes * importance) @ weights[0])
    assert sums.error.tolist() == [7 * 0.0625]


def test_small_errors_do_not_drown_in_large_weights() -> None:
    weights = 1000 + torch.tensor([[0.0, 2**-10, 0.5]])
    sums = SortedGroups(weights, torch.ones(1, 3)).normal_equations(
        Scales(torch.tensor([[0.25]]), torch.tensor([1000.25]))
    )
    torch.testing.assert_close(sums.error, torch.tensor([2.0**-20], dtype=torch.float64))
