"""Hidden states on disk: one batch in memory at a time, and one file per depth from which a run can resume."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from shiftadd_cli.artifact.shards import Shard, plan_shards, read_header
from shiftadd_cli.blockwise.hidden_states import HiddenStates
from shiftadd_cli.errors import ArtifactError, OutputError
from shiftadd_cli.storage.durable import checksum, read_tensor, reserve, sync, write_all, write_tensor
from shiftadd_cli.storage.record_file import damaged
from shiftadd_cli.storage.refusals import refusals

_TENSOR = "hidden_states"


@dataclass
class _File:
    """One depth: a safetensors file with one tensor `[samples, seq_len, width]`; `sums` are its batches' CRC-32."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    sums: dict[int, int] = field(default_factory=dict)

    @classmethod
    def create(cls, path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> _File:
        layout = _layout(shape, dtype)
        with refusals(path):
            path.parent.mkdir(exist_ok=True)
            with path.open("wb", buffering=0) as file:
                reserve(file, layout.nbytes)
                write_all(file, memoryview(layout.header))
        return cls(path, shape, dtype, len(layout.header))

    @classmethod
    def open(cls, path: Path) -> _File:
        try:
            header = read_header(path)
        except ArtifactError as failure:
            raise damaged(path, str(failure)) from failure
        if header.keys() != {_TENSOR} or not header[_TENSOR][0]:
            raise damaged(path, "it holds no hidden states")
        shape, dtype = header[_TENSOR]
        return cls(path, shape, dtype, len(_layout(shape, dtype).header))

    def read(self, first: int, count: int) -> Tensor:
        """The states of `count` windows, starting at window `first`."""
        try:
            with self.path.open("rb", buffering=0) as file:
                return read_tensor(file, self._offset(first), (count, *self.shape[1:]), self.dtype)
        except OSError as failure:
            raise OutputError(
                f"{self.path}, which this run wrote, cannot be read ({failure.strerror or failure}); check the disk."
            ) from failure

    def write(self, first: int, batch: Tensor) -> int:
        """Write the states of windows, starting at window `first`; returns their CRC-32."""
        if (tuple(batch.shape[1:]), batch.dtype) != (self.shape[1:], self.dtype):
            raise ValueError(
                f"hidden states are {batch.dtype} {tuple(batch.shape)}, but the file stores {self.dtype} {self.shape}"
            )
        with refusals(self.path), self.path.open("rb+", buffering=0) as file:
            return write_tensor(file, self._offset(first), batch)

    def _offset(self, first: int) -> int:
        return self.start + first * torch.Size(self.shape[1:]).numel() * self.dtype.itemsize


class StoredStates(HiddenStates):
    """Hidden states in files in `folder`, in batches of `batch_size` windows; the last batch may be smaller.

    `append` and `replace` write immediately, `[]` reads. The outputs of a block go into a new file; `turn` ends the
    block. Errors of the file system raise OutputError.
    """

    def __init__(self, folder: Path, samples: int, batch_size: int, name: str = "quantized", depth: int = 0) -> None:
        super().__init__(samples, batch_size)
        self.folder, self.name, self.depth = folder, name, depth
        self._inputs: _File | None = None
        self._outputs: _File | None = None
        self._filled = 0

    @classmethod
    def reopen(
        cls, folder: Path, samples: int, batch_size: int, name: str, depth: int, file: str, sums: Sequence[int]
    ) -> StoredStates:
        """The states before block `depth` that an earlier run stored in `file`, whose batches had the CRC-32 `sums`.

        Raises ResumeError where the file has changed since.
        """
        states = cls(folder, samples, batch_size, name, depth)
        inputs = states._inputs = _File.open(folder / file)
        batches = -(-samples // batch_size)
        if inputs.shape[0] != samples or len(sums) != batches:
            raise damaged(inputs.path, "it belongs to other windows")
        states._filled = batches
        for index, expected in enumerate(sums):
            inputs.sums[index] = checksum(states[index])
            if inputs.sums[index] != expected:
                raise damaged(inputs.path, "it does not match its checksum")
        return states

    def append(self, batch: Tensor) -> None:
        if self._inputs is None:
            self._inputs = self._create(self.depth, batch)
        self._inputs.sums[self._filled] = self._inputs.write(self._filled * self.batch_size, batch)
        self._filled += 1

    def replace(self, index: int, batch: Tensor) -> None:
        if self._outputs is None:
            self._outputs = self._create(self.depth + 1, batch)
        self._outputs.sums[index] = self._outputs.write(index * self.batch_size, batch)

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(index)
        file = self._outputs if self._outputs is not None and index in self._outputs.sums else self._inputs
        assert file is not None, "no batch was appended"
        span = self.span(index)
        return file.read(span.start, span.stop - span.start)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def __len__(self) -> int:
        return self._filled

    @property
    def nbytes(self) -> int:
        return sum(batch.nbytes for batch in self)

    def turn(self) -> None:
        """Make the outputs the inputs of the next block, once all batches have been replaced."""
        assert self._outputs is not None, "no batch was replaced"
        assert len(self._outputs.sums) == self._filled, "a batch was not replaced"
        self._inputs, self._outputs = self._outputs, None
        self.depth += 1

    def sync(self) -> tuple[str, list[int]]:
        """Wait until the inputs are on disk; returns the name of their file and the CRC-32 of each batch."""
        assert self._inputs is not None, "no batch was appended"
        with refusals(self._inputs.path):
            sync(self._inputs.path)
            sync(self.folder)
        return self._inputs.path.name, [self._inputs.sums[index] for index in range(self._filled)]

    def _create(self, depth: int, batch: Tensor) -> _File:
        path = self.folder / f"{self.name}-{depth:05}.safetensors"
        return _File.create(path, (self.samples, *batch.shape[1:]), batch.dtype)


def _layout(shape: tuple[int, ...], dtype: torch.dtype) -> Shard:
    return plan_shards({_TENSOR: (shape, dtype)}, 1)[0]
