"""How a model calls its blocks for every batch of samples.

First, `blockwise.passage` finds the tensors that pass between the blocks and checks that running the blocks one by one
reproduces the model. Then every batch runs up to the blocks, which are replaced by stubs, and the arguments are
recorded: masks, positions, and values that depend on the tokens, such as Gemma 3n's inputs of each layer. Tensors that
are the same for all batches (masks and positions usually are) are stored once; the others go into a file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path as FilePath
from typing import Any

from torch import Tensor

from shiftadd_cli.blockwise.calls import BlockCall, Path, Spilled, substituted
from shiftadd_cli.blockwise.head import Form
from shiftadd_cli.blockwise.hidden_states import HiddenStates, batch_span
from shiftadd_cli.blockwise.model import BlockwiseModel
from shiftadd_cli.blockwise.passage import Passage, same_values
from shiftadd_cli.blockwise.tensor_file import TensorFile


@dataclass
class Trace:
    """How a model calls its blocks for some samples.

    Attributes:
        hidden: the states that enter the first block.
        calls: `calls[batch][block]`, for the batches that this process runs.
        passage: the tensors that pass between the blocks.
    """

    hidden: HiddenStates
    passage: Passage
    calls: dict[int, list[BlockCall]] = field(default_factory=dict)

    def calls_of(self, depth: int) -> dict[int, BlockCall]:
        """The calls of block number `depth`, by batch."""
        return {index: per_block[depth] for index, per_block in self.calls.items()}

    @property
    def forms(self) -> list[Form]:
        """The form of each block's output."""
        return self.passage.forms


def trace_model(
    model: BlockwiseModel,
    samples: Tensor,
    batch_size: int,
    hidden: HiddenStates | None = None,
    *,
    passage: Passage | None = None,
    batches: Iterable[int] | None = None,
    spill: FilePath | None = None,
) -> Trace:
    """Record how the model calls its blocks for `samples`, and compute the states that enter the first block.

    samples: int64 `[samples, seq_len]` tokens, or `[samples, channels, height, width]` pixels for a vision model.
    hidden: stores the states, by default in memory; batches that it already has are not appended.
    passage: that of an earlier trace of `model`, which has been checked. It saves two passes through the blocks.
    batches: numbers of the batches whose calls are recorded, by default all.
    spill: folder for arguments that differ between batches, by default the system's temporary folder.

    The parts outside the blocks must be loaded; blocks are loaded and released here. Raises
    SourceError where running block by block differs from the model's forward, naming the block and the argument;
    NumericalError where weights or outputs of a block are not finite.
    """
    if passage is None:
        passage = Passage.of(model, samples)
        passage.check(samples[-1:])
    states = HiddenStates(len(samples), batch_size) if hidden is None else hidden
    trace = Trace(states, passage)
    stored = len(trace.hidden)
    recorder = _Recorder(passage, spill)
    count = -(-len(samples) // batch_size)
    recorded = set(range(count) if batches is None else batches)
    for index in range(count):
        if index < stored and index not in recorded:
            continue
        entering, arguments = passage.arguments(samples[batch_span(index, batch_size, len(samples))])
        if index in recorded:
            trace.calls[index] = recorder.calls(index, arguments)
        if index >= stored:
            trace.hidden.append(passage.states[0].pack(entering))
    return trace


class _Recorder:
    """Makes calls from recorded arguments, and stores tensors that all batches share only once."""

    def __init__(self, passage: Passage, spill: FilePath | None) -> None:
        self._passage, self._spill = passage, spill
        self._first: list[dict[Path, Any]] | None = None
        self._file: TensorFile | None = None

    def calls(self, index: int, arguments: list[dict[Path, Any]]) -> list[BlockCall]:
        """The calls of batch number `index`."""
        if self._first is None:
            self._first = arguments
        # A tensor that several blocks read (a mask, the embeddings) is stored once.
        by_id: dict[int, Any] = {}
        calls = []
        for depth, originals in enumerate(arguments):
            for path, leaf in originals.items():
                if isinstance(leaf, Tensor) and id(leaf) not in by_id:
                    by_id[id(leaf)] = self._store(index, depth, path, leaf)
            stored = {path: by_id.get(id(leaf), leaf) for path, leaf in originals.items()}
            calls.append(self._passage.call(depth, partial(substituted, stored)))
        return calls

    def _store(self, index: int, depth: int, path: Path, leaf: Tensor) -> Any:
        assert self._first is not None, "no batch was recorded"
        first = self._first[depth].get(path)
        if isinstance(first, Tensor) and (leaf is first or (leaf.shape == first.shape and same_values(leaf, first))):
            return first
        if self._file is None:
            self._file = TensorFile(self._spill)
        key = (index, depth, path)
        self._file[key] = leaf
        return Spilled(self._file, key, self._passage.device)
