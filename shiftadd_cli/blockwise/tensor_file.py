"""Tensors that wait in a file instead of in memory."""

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


class _Place(NamedTuple):
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class TensorFile:
    """Tensors by key, in a file of `folder` (by default where the system keeps such) that has no name and is gone with
    the process. What the system refuses raises OutputError."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = Path(tempfile.gettempdir()) if folder is None else folder
        with refusals(self._folder):
            self._file: BinaryIO = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed by __exit__
        self._places: dict[Hashable, _Place] = {}
        self._end = 0

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._places

    def __getitem__(self, key: Hashable) -> Tensor:
        """A copy on the CPU."""
        with refusals(self._folder):
            return read_tensor(self._file, *self._places[key])

    def __setitem__(self, key: Hashable, tensor: Tensor) -> None:
        """The place of what had the key before is not used again."""
        place = _Place(self._end, tuple(tensor.shape), tensor.dtype)
        with refusals(self._folder):
            put_tensor(self._file, place.start, tensor)
        self._places[key] = place
        self._end += tensor.nbytes
