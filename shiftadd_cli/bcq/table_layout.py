"""How the weight of an embedding, a head or a patch embedding is stored: as 8-bit rows (see `int8`), or as a compressed
matrix like those of linear layers (see `weight`), which may have several bits fewer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from shiftadd_cli.bcq.choices import ROWS, Primitive, table_words
from shiftadd_cli.bcq.int8 import table_tensors
from shiftadd_cli.bcq.matrix_format import MatrixFormat
from shiftadd_cli.bcq.primitives.base import TensorShapes
from shiftadd_cli.bcq.weight import PackedLayout


@dataclass(frozen=True)
class TableLayout:
    """The storage of a weight of `shape`: `[rows, columns]`, or `[rows, channels, height, width]` for the kernels of a
    convolution, whose matrix has a column for each number of a kernel. Without a `format` it is 8-bit rows."""

    shape: tuple[int, ...]
    format: MatrixFormat | None = None

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def columns(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def primitive(self) -> Primitive | None:
        """That of the compressed matrix; None for 8-bit rows."""
        return None if self.format is None else self.format.primitive

    @property
    def bits(self) -> int:
        """Stored bits of a weight's code."""
        return ROWS if self.format is None else self.format.bits

    @property
    def form(self) -> str:
        """The form in words, such as `8-bit rows` or `trellis1-4`."""
        return table_words(self.primitive, self.bits)

    @cached_property
    def packed(self) -> PackedLayout | None:
        """The layout of the compressed matrix; None for 8-bit rows."""
        return None if self.format is None else PackedLayout(self.format, self.rows, self.columns)

    def tensors(self) -> TensorShapes:
        """Shape and dtype of every stored tensor, by suffix."""
        return table_tensors(*self.shape) if self.packed is None else self.packed.tensors()

    @property
    def nbytes(self) -> int:
        """Bytes stored for the weight, all tensors included."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / math.prod(self.shape)
