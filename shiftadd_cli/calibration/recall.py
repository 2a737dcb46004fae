"""What the linears of an original block read, noted in one run of it and recalled as often as it is asked for.

The block that is being quantized runs once for each group of its linears, since each group changes what the next ones
read. The original does not change, so it need not run with it: what its linears read waits in a file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from shiftadd_cli.artifact.durable import read_tensor, write_tensor
from shiftadd_cli.artifact.output import refusals
from shiftadd_cli.calibration.stream import BlockStream
from shiftadd_cli.distributed.team import ALONE, Team


class _Place(NamedTuple):
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Recall:
    """Inputs of modules by batch and name, in a file of `folder` (by default where the system keeps such) that has no
    name and is gone with the process. What the system refuses raises OutputError."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = Path(tempfile.gettempdir()) if folder is None else folder
        with refusals(self._folder):
            self._file: BinaryIO = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed by __exit__
        self._places: dict[tuple[int, str], _Place] = {}
        self._end = 0

    def __enter__(self) -> Recall:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def advance(self, stream: BlockStream, names: Sequence[str], block: str, team: Team = ALONE) -> None:
        """Run all batches through the block, note what the modules `names` read, and put outputs in place of inputs.

        block: what errors call it. Each process of a team notes the batches that it runs, and the first is told of all
        outputs.
        """
        stream.advance(block, team, names, self._note)

    def inputs(self, index: int, names: Sequence[str]) -> dict[str, Tensor]:
        """What the modules read when batch `index` ran through, those that did; on the CPU."""
        places = {name: self._places[index, name] for name in names if (index, name) in self._places}
        with refusals(self._folder):
            return {name: read_tensor(self._file, *place) for name, place in places.items()}

    def _note(self, index: int, seen: dict[str, Tensor]) -> None:
        for name, inputs in seen.items():
            place = self._places[index, name] = _Place(self._end, tuple(inputs.shape), inputs.dtype)
            with refusals(self._folder):
                write_tensor(self._file, place.start, inputs)
            self._end += inputs.nbytes
