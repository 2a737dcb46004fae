from __future__ import annotations

import torch
from bcq_problems import generator, nearest_planes, quick
from hypothesis import given
from hypothesis import strategies as st

from shiftadd_cli.bcq.intervals import SortedGroups
from shiftadd_cli.bcq.starts import Scales


@quick
@given(
    bits=st.integers(1, 5),
    offset=st.booleans(),
    count=st.integers(1, 4),
    size=st.integers(1, 100),
    seed=st.integers(0, 999),
)
def test_sums_over_intervals_are_sums_over_weights(bits: int, offset: bool, count: int, size: int, seed: int) -> None:
    g = generator(seed)
    weights, scales = torch.randn(count, size, generator=g), torch.rand(count, bits, generator=g)
    importance = torch.rand(count, size, generator=g) - 0.1
    importance = importance.clamp_min(0)
    offsets = torch.randn(count, generator=g) if offset else None
    found = SortedGroups(weights, importance).normal_equations(Scales(scales, offsets))
    for i in range(count):
        planes, values = nearest_planes(weights[i], scales[i].tolist(), 0.0 if offsets is None else float(offsets[i]))
        terms = torch.cat((planes, torch.ones(int(offset), size, dtype=torch.float64)))
        h, w = importance[i].double(), weights[i].double()
        torch.testing.assert_close(found.matrix[i].double(), (terms * h) @ terms.T, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.rhs[i].double(), (terms * h) @ w, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.error[i], ((w - values).square() * h).sum(), rtol=1e-5, atol=1e-6)


def test_a_weight_on_a_midpoint_goes_to_the_lower_level() -> None:
    weights, importance = torch.tensor([[0.5, 0.0, -0.5]]), torch.tensor([[4.0, 2.0, 1.0]])
    # Levels ±0.25 and ±0.75, with midpoints on all three weights.
    found = SortedGroups(weights, importance).normal_equations(Scales(torch.tensor([[0.5, 0.25]]), None))
    planes = torch.tensor([[1.0, -1.0, -1.0], [-1.0, 1.0, -1.0]])
    assert torch.equal(found.matrix[0], (planes * importance) @ planes.T)
    assert torch.equal(found.rhs[0], (planes * importance) @ weights[0])
    assert found.error.tolist() == [7 * 0.0625]


def test_small_errors_do_not_drown_in_large_weights() -> None:
    weights = 1000 + torch.tensor([[0.0, 2**-10, 0.5]])
    found = SortedGroups(weights, torch.ones(1, 3)).normal_equations(
        Scales(torch.tensor([[0.25]]), torch.tensor([1000.25]))
    )
    torch.testing.assert_close(found.error, torch.tensor([2.0**-20], dtype=torch.float64))
