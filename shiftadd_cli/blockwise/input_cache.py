"""What the linears of an original block read, noted in one run of it and recalled as often as it is asked for.

The block that is being quantized runs once for each group of its linears, since each group changes what the next ones
read. The original does not change, so it need not run with it: what its linears read waits in a file.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from shiftadd_cli.blockwise.block_runner import BlockStream
from shiftadd_cli.blockwise.tensor_file import TensorFile
from shiftadd_cli.distributed.team import ALONE, Team


class InputCache:
    """Inputs of modules, kept in `file` by batch and name."""

    def __init__(self, file: TensorFile) -> None:
        self._file = file

    def advance(self, stream: BlockStream, names: Sequence[str], block: str, team: Team = ALONE) -> None:
        """Run all batches through the block, note what the modules `names` read, and put outputs in place of inputs.

        block: what errors call it. Each process of a team notes the batches that it runs, and the first is told of all
        outputs.
        """
        stream.advance(block, team, names, self._note)

    def inputs(self, index: int, names: Sequence[str]) -> dict[str, Tensor]:
        """What the modules read when batch `index` ran through, those that did; on the CPU."""
        return {name: self._file[index, name] for name in names if (index, name) in self._file}

    def _note(self, index: int, seen: dict[str, Tensor]) -> None:
        for name, inputs in seen.items():
            self._file[index, name] = inputs
