from __future__ import annotations

import math

import pytest
import torch
from bcq_problems import all_levels, distances_to_levels, generator, quick
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shiftadd_cli.bcq.primitives.planes.fit import FitMethod, GroupFit, _Best, _Piece, fit_groups
from shiftadd_cli.bcq.primitives.planes.initial_scales import Scales, clipped_starts, greedy_start
from shiftadd_cli.bcq.scale_formats import scale_format

METHODS: tuple[FitMethod, ...] = ("search", "greedy", "uniform")


def groups(seed: int, count: int = 40, size: int = 32, mean: float = 0.0) -> tuple[Tensor, Tensor]:
    """Weights and importance `[count, size]`."""
    g = generator(seed)
    weights = torch.randn(count, size, generator=g) * (0.1 + torch.rand(count, 1, generator=g)) + mean
    return weights, torch.rand(count, size, generator=g) ** 3 + 0.01


def errors(weights: Tensor, importance: Tensor, fit: GroupFit) -> Tensor:
    """Weighted error of each group under its nearest levels, float64, from the scales alone."""
    result = []
    for i, (w, h) in enumerate(zip(weights, importance, strict=True)):
        offset = 0.0 if fit.offsets is None else float(fit.offsets[i])
        result.append((distances_to_levels(w, fit.scales[i], offset).square() * h.double()).sum())
    return torch.stack(result)


class _Recorder(_Best):
    """Keeps every error it is offered."""

    def __init__(self, piece: _Piece) -> None:
        super().__init__(len(piece.w), piece.bits, piece.offset, piece.w)
        self.seen: list[Tensor] = []

    def offer(self, fit: Scales, error: Tensor) -> None:
        self.seen.append(error)
        super().offer(fit, error)


@quick
@given(bits=st.integers(1, 5), offset=st.booleans(), seed=st.integers(0, 999), size=st.integers(1, 40))
def test_no_round_raises_the_weighted_error(bits: int, offset: bool, seed: int, size: int) -> None:
    weights, importance = groups(seed, size=size)
    piece = _Piece(weights, importance, bits, offset, math.inf, None)
    energy = (weights.square() * importance).sum(-1)
    for start in [greedy_start(weights, importance, bits), *clipped_starts(weights, importance, bits, offset)]:
        recorder = _Recorder(piece)
        piece._alternate(start, 6, recorder)
        for before, after in zip(recorder.seen, recorder.seen[1:], strict=False):
            assert (after <= before * (1 + 1e-4) + 1e-7 * energy).all()
        assert torch.equal(recorder.error, torch.stack(recorder.seen).amin(0))


@quick
@given(
    bits=st.integers(1, 6),
    offset=st.booleans(),
    rounds=st.integers(0, 6),
    limit=st.sampled_from([0.875, math.inf]),
    seed=st.integers(0, 999),
)
def test_search_is_never_worse_than_greedy(bits: int, offset: bool, rounds: int, limit: float, seed: int) -> None:
    weights, importance = groups(seed)
    search, greedy = (
        errors(
            weights,
            importance,
            fit_groups(weights, importance, bits, method=method, rounds=rounds, offset=offset, offset_limit=limit),
        )
        for method in ("search", "greedy")
    )
    assert (search <= greedy * (1 + 1e-4) + 1e-6).all()


def test_search_is_much_better_than_greedy_at_three_bits() -> None:
    weights, importance = groups(1, count=300, size=64)
    search, greedy = (
        errors(weights, importance, fit_groups(weights, importance, 3, method=method)).sum()
        for method in ("search", "greedy")
    )
    assert search < 0.9 * greedy


@pytest.mark.parametrize(
    ("bits", "offset"), [(1, False), (1, True), (2, False), (2, True), (3, False), (3, True), (4, False)]
)
def test_a_binary_coded_matrix_is_recovered(bits: int, offset: bool) -> None:
    g = generator(bits)
    scales = 0.5 ** torch.arange(bits) * (0.9 + 0.2 * torch.rand(30, bits, generator=g))
    offsets = 0.3 * torch.randn(30, generator=g) if offset else torch.zeros(30)
    codes = torch.arange(64) % 2**bits
    weights = torch.stack([all_levels(s, float(z))[codes] for s, z in zip(scales, offsets, strict=True)]).float()
    importance = torch.rand(weights.shape, generator=g) + 0.1
    fit = fit_groups(weights, importance, bits, rounds=8, offset=offset)
    assert (errors(weights, importance, fit) < 1e-9 * (weights.square() * importance).sum(-1)).all()
    torch.testing.assert_close(fit.scales.sort(descending=True).values, scales, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("offset", [False, True])
def test_padding_has_no_influence(method: FitMethod, offset: bool) -> None:
    weights, importance = groups(3, mean=0.5)
    padded = torch.nn.functional.pad(weights, (0, 9)), torch.nn.functional.pad(importance, (0, 9))
    alone = fit_groups(weights, importance, 3, method=method, offset=offset, offset_limit=0.875)
    beside = fit_groups(*padded, 3, method=method, offset=offset, offset_limit=0.875)
    # Errors are compared, not scales: between equal planes, rounding decides how they share.
    padded_errors = errors(weights, importance, beside)
    torch.testing.assert_close(padded_errors, errors(weights, importance, alone), rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_a_zero_group_has_no_error_and_disturbs_no_other(method: FitMethod, offset: bool, bits: int) -> None:
    weights, importance = groups(4, count=3)
    alone = fit_groups(weights[1:], importance[1:], bits, method=method, offset=offset)
    weights[0] = 0.0
    fit = fit_groups(weights, importance, bits, method=method, offset=offset)
    assert errors(weights, importance, fit)[0] == 0.0
    assert torch.isfinite(fit.scales).all()
    assert torch.isfinite(fit.curvature).all()
    torch.testing.assert_close(fit.scales[1:], alone.scales)


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("bits", [1, 3, 5])
def test_curvature_is_the_normal_matrix_of_the_nearest_codes(bits: int, offset: bool) -> None:
    weights, importance = groups(5, count=6)
    fit = fit_groups(weights, importance, bits, offset=offset)
    for i in range(len(weights)):
        z = 0.0 if fit.offsets is None else float(fit.offsets[i])
        levels = all_levels(fit.scales[i], z)
        codes = (weights[i].double().unsqueeze(-1) - levels).abs().argmin(-1)
        rows = [torch.where(codes >> b & 1 > 0, 1.0, -1.0).double() for b in range(bits)]
        basis = torch.stack([*rows, torch.ones_like(rows[0])][: bits + offset])
        expected = (basis * importance[i].double()) @ basis.T
        torch.testing.assert_close(fit.curvature[i].double(), expected, rtol=1e-5, atol=1e-5)


@quick
@given(bits=st.integers(1, 4), mean=st.floats(-4, 4), method=st.sampled_from(METHODS), seed=st.integers(0, 99))
def test_offsets_stay_within_their_limit(bits: int, mean: float, method: FitMethod, seed: int) -> None:
    weights, importance = groups(seed, mean=mean)
    fit = fit_groups(weights, importance, bits, method=method, offset=True, offset_limit=0.875)
    assert fit.offsets is not None
    assert (fit.offsets.abs() <= 0.875 * fit.scales.amax(-1) * (1 + 1e-5)).all()
    if method != "uniform":
        plain = fit_groups(weights, importance, bits, method="greedy", rounds=0)
        assert (errors(weights, importance, fit) <= errors(weights, importance, plain) * (1 + 1e-4) + 1e-6).all()


def test_on_the_limit_no_feasible_scales_are_better() -> None:
    # For fixed signs and a fixed largest plane the bound is exact, so no other point on it may have a lower error.
    bits, limit, g = 3, 0.875, generator(7)
    signs = torch.randn(50, bits, 32, generator=g).sign()
    weights = 3 + 0.3 * torch.randn(50, 32, generator=g) + 0.2 * signs[:, 1]
    importance = torch.rand(50, 32, generator=g) + 0.1
    basis = torch.cat((signs, torch.ones(50, 1, 32)), dim=1)
    weighted = basis * importance.unsqueeze(1)
    matrix, rhs = weighted @ basis.mT, (weighted @ weights.unsqueeze(-1)).squeeze(-1)
    piece = _Piece(weights, importance, bits, True, limit, None)
    free = torch.linalg.solve(matrix, rhs)
    largest, plane = free[:, :bits].abs().max(-1)
    bound = free[:, bits].abs() > limit * largest
    assert bound.all()
    fit = piece._solve(matrix, rhs)
    assert fit.offsets is not None
    assert (fit.offsets.abs() <= limit * fit.scales.amax(-1) * (1 + 1e-5)).all()

    def error(x: Tensor) -> Tensor:
        return (importance * (weights - (x.unsqueeze(-1) * basis).sum(1)).square()).sum(-1)

    # `_solve` returns sizes, and a plane may stand for its inverse, so its error is the best over all signs.
    candidates = []
    for code in range(2**bits):
        flips = torch.tensor([1.0 if code >> b & 1 else -1.0 for b in range(bits)])
        candidates.append(error(torch.cat((fit.scales * flips, fit.offsets.unsqueeze(-1)), dim=-1)))
    reached = torch.stack(candidates).amin(0)
    sign = torch.where(free[:, bits] * free.gather(1, plane.unsqueeze(1)).squeeze(1) < 0, -1.0, 1.0)
    for _ in range(200):
        scales = fit.scales * (0.5 + torch.rand(50, bits, generator=g)) * torch.randn(50, bits, generator=g).sign()
        offset = limit * sign * scales.gather(1, plane.unsqueeze(1)).squeeze(1)
        assert (reached <= error(torch.cat((scales, offset.unsqueeze(-1)), dim=-1)) * (1 + 1e-4)).all()


@pytest.mark.parametrize("name", ["pot", "apot2", "apot3"])
def test_scales_rounded_in_every_round_lie_on_the_format(name: str) -> None:
    form = scale_format(name)
    weights, importance = groups(8)
    weights /= weights.abs().max()
    fit = fit_groups(weights, importance, 3, method="greedy", rounds=20, rounding=form)
    assert torch.isin(fit.scales, form.values).all()
    start = greedy_start(weights, importance, 3)
    rounded = GroupFit(form.round(start.scales), None, fit.curvature)
    after, before = errors(weights, importance, fit), errors(weights, importance, rounded)
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < before.sum()


def test_pieces_do_not_change_results() -> None:
    weights, importance = groups(9, count=5000)
    full = fit_groups(weights, importance, 3, offset=True)
    part = fit_groups(weights[4990:], importance[4990:], 3, offset=True)
    torch.testing.assert_close(full.scales[4990:], part.scales, rtol=1e-3, atol=1e-5)
    assert full.offsets is not None
    assert len(full.offsets) == 5000


def test_times_scales_everything_but_the_curvature() -> None:
    weights, importance = groups(10, count=4)
    fit = fit_groups(weights, importance, 2, offset=True)
    factor = torch.tensor([[2.0], [1.0], [0.5], [4.0]])
    larger = fit.times(factor)
    expected = errors(weights, importance, fit) * factor.squeeze().double() ** 2
    torch.testing.assert_close(errors(weights * factor, importance, larger), expected)
    assert torch.equal(larger.curvature, fit.curvature)
