"""Inputs of an original block's linears, recorded in one run and read back as often as needed.

The block that is being quantized runs once for each group of its linears, because each group changes the inputs of the
next ones. The original does not change, so it runs only once: the inputs of its linears are stored in a file.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from shiftadd_cli.blockwise.block_runner import BlockStream
from shiftadd_cli.blockwise.tensor_file import TensorFile
from shiftadd_cli.distributed.team import ALONE, Team


class InputCache:
    """Inputs of modules, stored in `file` by batch and name."""

    def __init__(self, file: TensorFile) -> None:
        self._file = file

    def advance(self, stream: BlockStream, names: Sequence[str], block: str, team: Team = ALONE) -> None:
        """Run all batches through the block, record the inputs of the modules `names`, and replace inputs by outputs.

        block: its name in error messages. Each process of a team records the batches that it runs, and the first
        process receives all outputs.
        """
        stream.advance(block, team, names, self._note)

    def inputs(self, index: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Inputs of the modules in batch `index`, on the CPU; modules that did not run are left out."""
        return {name: self._file[index, name] for name in names if (index, name) in self._file}

    def _note(self, index: int, seen: dict[str, Tensor]) -> None:
        for name, inputs in seen.items():
            self._file[index, name] = inputs
