"""A block of a stored model as a stream of the hidden states that reach it."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from shiftadd_cli.blockwise.block_runner import BlockStream
from shiftadd_cli.blockwise.model import BlockwiseModel
from shiftadd_cli.blockwise.trace import trace_model
from shiftadd_cli.source import LinearSpec, find_structure, open_source


def block_stream(
    path: Path, windows: Tensor, batch_size: int, *, depth: int = 0, dtype: str = "auto"
) -> tuple[BlockStream, list[LinearSpec]]:
    """Block number `depth` (-1 for the last) with the states of the first one for `windows`, and its linears."""
    source = open_source(str(path), dtype=dtype)
    structure = find_structure(source.skeleton())
    source.materialise(structure.outside)
    trace = trace_model(BlockwiseModel(source, structure), windows, batch_size)
    number = range(len(structure.blocks))[depth]
    source.materialise([structure.blocks[number]])
    block = source.skeleton().get_submodule(structure.blocks[number])
    calls = {index: block_calls[number] for index, block_calls in trace.calls.items()}
    specs = [spec for spec in structure.linears if spec.block == number]
    return BlockStream("block", block, trace.hidden, calls), specs
