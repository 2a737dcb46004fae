"""Measurements of the benchmark on disk, in addition to the rows of `quality.rows`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field

from experiments.quality.rows import Stored, TestScore, file_name, read_stored, write_stored
from shiftadd_cli.allocation.plan_file import Kind
from shiftadd_cli.allocation.sensitivity import Sensitivities

S = TypeVar("S", bound="Kept")


class Kept(Stored[TestScore]):
    """A measurement without scores by test. `code`: SHA-256 of the sources that computed it."""

    scores: dict[str, TestScore] = Field(default_factory=dict)
    code: str


class SensitivityRow(Kept):
    """Sensitivities by linear and bits, and the seconds and memory of measuring them in a separate process."""

    costs: dict[str, dict[Kind, float]]
    shared_inputs: tuple[tuple[str, ...], ...]
    seconds: float
    peak_memory_bytes: int

    @property
    def found(self) -> Sensitivities:
        return Sensitivities(self.costs, self.shared_inputs)


class AloneRow(Kept):
    """KL(original || model) in nats per token with only one linear replaced, by its full name."""

    bits: int
    kl: dict[str, float]


class SizeRow(Kept):
    """Requested bytes of the weight files, and those on disk."""

    target_bytes: int
    file_bytes: int


class SolverRow(Kept):
    """Seconds of the integer program for a model of random sensitivities, at several budgets."""

    blocks: int
    linears: int
    candidates: int
    seconds: tuple[float, ...]


def find_or_make(
    work: Path, label: str, bits: int, kind: type[S], settings: dict[str, Any], make: Callable[[], S]
) -> S:
    """The measurement of these settings in `work`, made and written if it is missing."""
    path = work / "rows" / (file_name(label, bits, settings) + ".json")
    stored = read_stored(path, kind, settings)
    if stored is None:
        stored = make()
        write_stored(path, stored)
    return stored
