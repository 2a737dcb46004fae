"""What a primitive is: a way to write a weight as a code of a few bits, with scales.

A primitive says what is stored beside the codes, how codes and scales are found, and how they are decoded and computed.
Everything else about a matrix (rotation, outlier columns, planes of the codes, row scales) is the same for all, and in
`weight` and `solver`.
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
from shiftadd_cli.bcq.grid import ScaleGrid
from shiftadd_cli.bcq.hessian import Objective
from shiftadd_cli.bcq.matrix_format import MatrixFormat
from shiftadd_cli.bcq.options import SolverOptions
from shiftadd_cli.bcq.snap import SnappedScales

Operation = Literal["fp16_multiply", "fp32_add", "int8_multiply", "int32_add", "shift", "sram_16_bits", "dram_byte"]
Counts: TypeAlias = Counter[Operation]

TensorShapes: TypeAlias = dict[str, tuple[tuple[int, ...], torch.dtype]]
Tensors: TypeAlias = Mapping[str, Tensor]
# Writes some rows of the decoded matrix, relative to the row scale, into zeros float32 `[rows, in]`.
RowDecoder: TypeAlias = Callable[[slice, Tensor], None]

NO_SCALES = "none"


@dataclass(frozen=True)
class Scales:
    """The scales of one matrix: its groups, the format of their scales (`NO_SCALES` where only rows have scales),
    whether each row has a factor of its own, and whether groups have offsets."""

    grid: ScaleGrid
    scale_format: str
    row_scale: bool
    offset: bool


class Primitive(ABC):
    """One primitive. `name` is its word in recipes and checkpoints.

    Attributes:
        format_version: the least version of a checkpoint that may hold it.
        lookup_kernels: whether a product is that of sign planes and scales, which the look-up kernels compute.
    """

    name: PrimitiveName
    format_version: ClassVar[int]
    lookup_kernels: ClassVar[bool]

    @abstractmethod
    def scales(self, form: MatrixFormat, rows: int, columns: int) -> Scales:
        """The scales of a `[rows, columns]` matrix of this format."""

    @abstractmethod
    def tensors(self, scales: Scales, bits: int) -> TensorShapes:
        """Shape and dtype of the stored scales and offsets by suffix, the row scale among them."""

    @abstractmethod
    def independent_rows(self, form: MatrixFormat) -> bool:
        """Whether no row shares a scale with another, so that rows can be solved apart."""

    @abstractmethod
    def fits_on_arrival(self, options: SolverOptions) -> bool:
        """Whether the sweep fits a group when it gets there, so that it must take whole groups in turn."""

    @abstractmethod
    def solve(self, weights: Tensor, objective: Objective, options: SolverOptions) -> tuple[Tensor, SnappedScales]:
        """Codes uint8 `[out, in]` and scales of weights float32 `[out, in]` with the least error in `objective`."""

    @abstractmethod
    def pack_scales(self, scales: Scales, ratios: Tensor, offsets: Tensor | None) -> dict[str, Tensor]:
        """Scales and offsets (as in `SnappedScales`) as they are stored, without the row scale."""

    @abstractmethod
    def ratios(self, scales: Scales, bits: int, tensors: Tensors) -> Tensor | None:
        """Stored scales relative to the row scale, float32 `[R, C, bits]`; None where there are none."""

    @abstractmethod
    def offsets(self, scales: Scales, tensors: Tensors, ratios: Tensor) -> Tensor | None:
        """Stored offsets relative to the row scale, float32 `[R, C]`, or None; `ratios` as `ratios()` gives them."""

    @abstractmethod
    def levels(self, bits: int, ratios: Tensor | None, offsets: Tensor | None) -> Tensor:
        """The value of every code relative to the row scale, float32 `[R, C, 2 ** bits]`, where a size may be 1."""

    @abstractmethod
    def decoder(self, scales: Scales, bits: int, tensors: Tensors) -> RowDecoder:
        """Decodes rows of a matrix from its stored tensors."""

    @abstractmethod
    def operations(self, scales: Scales, bits: int, *, tables: bool) -> Counts:
        """Operations of the product with one input, without what every compressed matrix needs: rotation, row scales,
        outlier columns and traffic. tables: by look-ups of the signed sums of 4 inputs, where there is this way."""

    @abstractmethod
    def words(self, scales: Scales) -> tuple[str, ...]:
        """How the scales are stored, in a few words."""
