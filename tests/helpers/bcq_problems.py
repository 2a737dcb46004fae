"""Small problems for the tests of `bcq`: random weights, Hessians of correlated inputs, and slow exact references."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

# Examples are the same in every run, so failures are reproducible.
quick = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Float32 `[rows, columns]` with rows of different spread."""
    g = generator(seed)
    return torch.randn(rows, columns, generator=g) * (0.02 + 0.08 * torch.rand(rows, 1, generator=g))


def random_hessian(columns: int, seed: int = 0, samples: int | None = None) -> Tensor:
    """Float32 `[columns, columns]`: second moment of correlated inputs, two of them much stronger than the rest."""
    g = generator(seed)
    samples = 4 * columns if samples is None else samples
    mixing = torch.randn(columns, columns, generator=g) / columns**0.5
    strength = torch.logspace(0, -1.5, columns)
    inputs = torch.randn(samples, columns, generator=g) @ (strength.unsqueeze(-1) * mixing)
    inputs += 0.05 * torch.randn(samples, columns, generator=g)
    inputs[:, : min(2, columns)] *= 5
    return inputs.T @ inputs / samples


def random_spd(size: int, seed: int = 0, batch: tuple[int, ...] = ()) -> Tensor:
    """Float32 `[*batch, size, size]`, symmetric positive definite and far from diagonal."""
    g = generator(seed)
    root = torch.randn(*batch, size, size + 2, generator=g)
    product = root @ root.mT
    return (product + product.mT) / 2 + 1e-3 * torch.eye(size)


def quadratic_error(difference: Tensor, form: Tensor) -> Tensor:
    """(w − ŵ) H (w − ŵ)ᵀ of every row of `difference` `[rows, columns]`, in float64."""
    wide = difference.double()
    return ((wide @ form.double()) * wide).sum(-1)


def all_levels(scales: Tensor, offset: float = 0.0) -> Tensor:
    """Every level Σ ±α_b + offset of scales `[bits]`, float64, in the order of codes (bit b of the code set: +α_b)."""
    levels = []
    for code in range(2 ** len(scales)):
        signs = [1.0 if code >> b & 1 else -1.0 for b in range(len(scales))]
        levels.append(sum(s * float(a) for s, a in zip(signs, scales, strict=True)) + offset)
    return torch.tensor(levels, dtype=torch.float64)


def distances_to_levels(weights: Tensor, scales: Tensor, offset: float = 0.0) -> Tensor:
    """Distance of each weight to the nearest level, float64, by comparison with all levels."""
    return (weights.double().unsqueeze(-1) - all_levels(scales, offset)).abs().amin(-1)


def nearest_planes(weights: Tensor, scales: list[float], offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Planes ±1 `[bits, size]` and values `[size]` of the nearest levels of weights `[size]`, float64."""
    levels = all_levels(torch.tensor(scales, dtype=torch.float64), offset)
    codes = (weights.double().unsqueeze(-1) - levels).abs().argmin(-1)
    planes = [torch.where(codes >> b & 1 > 0, 1.0, -1.0).double() for b in range(len(scales))]
    return torch.stack(planes), levels[codes]
