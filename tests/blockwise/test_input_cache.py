"""Cached inputs are the tensors that a block's linears read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shiftadd_cli.blockwise.block_runner import BlockStream
from shiftadd_cli.blockwise.calls import BlockCall
from shiftadd_cli.blockwise.hidden_states import HiddenStates
from shiftadd_cli.blockwise.input_cache import InputCache
from shiftadd_cli.blockwise.tensor_file import TensorFile
from shiftadd_cli.errors import NumericalError


class Block(nn.Module):
    """Two linears in a row; the second does not run on batches of one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.first(hidden)
        return self.second(inner) if len(hidden) > 1 else hidden


@pytest.fixture
def stream() -> BlockStream:
    torch.manual_seed(0)
    hidden = HiddenStates(5, 2)
    for size in (2, 2, 1):
        hidden.append(torch.randn(size, 3, 4, dtype=torch.bfloat16))
    calls = {index: BlockCall((), {}) for index in range(3)}
    return BlockStream("model.layers.3", Block().bfloat16(), hidden, calls)


def test_inputs_are_cached_while_the_states_advance(tmp_path: Path, stream: BlockStream) -> None:
    assert isinstance(stream.block, Block)
    before = [batch.clone() for batch in stream.hidden]
    with TensorFile(tmp_path) as file:
        cache = InputCache(stream, file)
        cache.advance(["second", "first"])
        for _ in range(2):
            for index, batch in reversed(list(enumerate(before))):
                inputs = cache.inputs(index, ["first", "second"])
                assert torch.equal(inputs["first"], batch)
                if len(batch) > 1:
                    assert torch.equal(inputs["second"], stream.block.first(batch))
                    assert torch.equal(stream.hidden[index], stream.block(batch))
                else:
                    assert "second" not in inputs, "it did not run"


def test_outputs_that_are_not_finite_are_refused_by_name(tmp_path: Path, stream: BlockStream) -> None:
    assert isinstance(stream.block, Block)
    stream.block.second.weight.data.fill_(torch.inf)
    with TensorFile(tmp_path) as file, pytest.raises(NumericalError, match=r"model\.layers\.3"):
        InputCache(stream, file).advance(["first"])
