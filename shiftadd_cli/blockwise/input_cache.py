"""Inputs of an original block's linears, recorded in one run and read back as often as needed.

The block that is being quantized runs once for each group of its linears, because each group changes the inputs of the
next ones. The original does not change, so it runs only once: the inputs of its linears are stored in a file.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from shiftadd_cli.blockwise.block_runner import OUTPUT, BlockStream
from shiftadd_cli.blockwise.tensor_file import TensorFile


class InputCache:
    """Inputs of modules of the block of `stream`, stored in `file` by batch and name."""

    def __init__(self, stream: BlockStream, file: TensorFile) -> None:
        self._stream, self._file = stream, file

    def advance(self, names: Sequence[str]) -> None:
        """Run all batches through the block, record the inputs of the modules `names`, and replace inputs by outputs.

        Each process of a team records the batches that it runs, and the first process receives all outputs.
        """
        self._stream.advance(names, self._note)

    def inputs(self, index: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Inputs of the modules in batch `index`, on the CPU; `OUTPUT` stands for the reader of the block's output;
        modules that did not run are left out."""
        seen = {name: self._file[index, name] for name in names if (index, name) in self._file}
        return seen | {OUTPUT: self._stream.hidden[index]} if OUTPUT in names else seen

    def _note(self, index: int, seen: dict[str, Tensor]) -> None:
        for name, inputs in seen.items():
            self._file[index, name] = inputs
