"""Tensors stored in a temporary file instead of in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Hashable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from shiftadd_cli.storage.durable import put_tensor, read_tensor
from shiftadd_cli.storage.refusals import refusals


class _Extent(NamedTuple):
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class TensorFile:
    """Tensors by key, in an unnamed file in `folder` (by default the system's temporary folder) that disappears with
    the process. Errors of the file system raise OutputError."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = Path(tempfile.gettempdir()) if folder is None else folder
        with refusals(self._folder):
            self._file: BinaryIO = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed by __exit__
        self._extents: dict[Hashable, _Extent] = {}
        self._end = 0

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._extents

    def __getitem__(self, key: Hashable) -> Tensor:
        """A copy of the tensor, on the CPU."""
        with refusals(self._folder):
            return read_tensor(self._file, *self._extents[key])

    def __setitem__(self, key: Hashable, tensor: Tensor) -> None:
        """Store a tensor; the space of an earlier tensor with this key is not reused."""
        extent = _Extent(self._end, tuple(tensor.shape), tensor.dtype)
        with refusals(self._folder):
            put_tensor(self._file, extent.start, tensor)
        self._extents[key] = extent
        self._end += tensor.nbytes
