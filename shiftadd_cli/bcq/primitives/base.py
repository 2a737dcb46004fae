"""The interface of a primitive: a way to represent a weight as a code of a few bits, with scales.

A primitive defines which tensors are stored next to the codes, how codes and scales are found and decoded, and the cost
of a product. Everything else about a matrix (rotation, outlier columns, planes of the codes, row scales) is the same
for all primitives and is in `weight` and `solver`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from shiftadd_cli.bcq.choices import Primitive as PrimitiveName
from shiftadd_cli.bcq.grid import Rows, ScaleGrid
from shiftadd_cli.bcq.hessian import Objective
from shiftadd_cli.bcq.matrix_format import MatrixFormat
from shiftadd_cli.bcq.options import SolverOptions
from shiftadd_cli.bcq.snap import SnappedScales

Operation = Literal[
    "fp16_multiply", "fp32_add", "int8_multiply", "int32_add", "shift", "xor_16_bits", "sram_16_bits", "dram_byte"
]  # fmt: skip
Counts: TypeAlias = Counter[Operation]

TensorShapes: TypeAlias = dict[str, tuple[tuple[int, ...], torch.dtype]]
Tensors: TypeAlias = Mapping[str, Tensor]
# Writes some rows of the decoded matrix, relative to the row scale, into float32 zeros `[rows, in]`.
RowDecoder: TypeAlias = Callable[[Rows, Tensor], None]

NO_SCALES = "none"


@dataclass(frozen=True)
class Scales:
    """The scales of one matrix: its groups, the format of their scales (`NO_SCALES` if only rows have scales), whether
    each row has a factor of its own, and whether groups have offsets."""

    grid: ScaleGrid
    scale_format: str
    row_scale: bool
    offset: bool


class Primitive(ABC):
    """One primitive. `name` is its name in recipes and checkpoints.

    Attributes:
        format_version, plan_version: the lowest versions of checkpoints and of bit plans that can contain it.
        stripe: rows are decoded in stripes of this many, beginning with the first row.
        lookup_kernels: whether its product is one of sign planes and scales, which the look-up kernels compute.
    """

    name: PrimitiveName
    format_version: ClassVar[int]
    plan_version: ClassVar[Literal[1, 2, 3]]
    stripe: ClassVar[int] = 1
    lookup_kernels: ClassVar[bool]

    @abstractmethod
    def scales(self, form: MatrixFormat, rows: int, columns: int) -> Scales:
        """The scales of a `[rows, columns]` matrix of this format."""

    def planes(self, bits: int) -> int:
        """Number of planes that are computed from the stored bits of a code."""
        return bits

    def packed_planes(self, codes: Tensor, rows: Rows, bits: int) -> Tensor:
        """The computed planes of some rows, uint8 `[rows, planes, ceil(in / 8)]`, from the stored bits of all rows,
        uint8 `[out, bits, ceil(in / 8)]`."""
        return codes[rows]

    @abstractmethod
    def tensors(self, scales: Scales, bits: int) -> TensorShapes:
        """Shape and dtype of the stored scales and offsets by suffix, including the row scale."""

    @abstractmethod
    def rows_together(self, form: MatrixFormat) -> int | None:
        """Parts of this many consecutive rows of a matrix can be solved separately; None if no part can."""

    @abstractmethod
    def fits_on_arrival(self, options: SolverOptions) -> bool:
        """Whether the sweep fits each group on arrival and so must process one whole group after another."""

    @abstractmethod
    def solve(self, weights: Tensor, objective: Objective, options: SolverOptions) -> tuple[Tensor, SnappedScales]:
        """Codes uint8 `[out, in]` and scales of weights float32 `[out, in]` with the least error in `objective`."""

    @abstractmethod
    def pack_scales(self, scales: Scales, ratios: Tensor, offsets: Tensor | None) -> dict[str, Tensor]:
        """The stored tensors of scales and offsets (as in `SnappedScales`), without the row scale."""

    @abstractmethod
    def ratios(self, scales: Scales, bits: int, tensors: Tensors) -> Tensor | None:
        """Stored scales relative to the row scale, float32 `[R, C, planes]`; None if there are none."""

    @abstractmethod
    def offsets(self, scales: Scales, tensors: Tensors, ratios: Tensor) -> Tensor | None:
        """Stored offsets relative to the row scale, float32 `[R, C]`, or None; `ratios` is the result of `ratios()`."""

    @abstractmethod
    def levels(self, bits: int, ratios: Tensor | None, offsets: Tensor | None) -> Tensor:
        """The value of every level relative to the row scale, float32 `[R, C, 2 ** planes]`, where R and C may be 1."""

    @abstractmethod
    def decoder(self, scales: Scales, bits: int, tensors: Tensors) -> RowDecoder:
        """A function that decodes rows of a matrix from its stored tensors."""

    @abstractmethod
    def operations(self, scales: Scales, bits: int, *, tables: bool) -> Counts:
        """Operations of the product with one input, without those of every compressed matrix: rotation, row scales,
        outlier columns and traffic. tables: look up the signed sums of 4 inputs, if the primitive supports it."""

    @abstractmethod
    def words(self, scales: Scales) -> tuple[str, ...]:
        """A few words on how the scales are stored."""
