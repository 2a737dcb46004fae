"""A block as a stream sees it, against the same block run by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shiftadd_cli.blockwise.block_runner import BlockStream
from shiftadd_cli.blockwise.calls import BlockCall
from shiftadd_cli.blockwise.hidden_states import HiddenStates
from shiftadd_cli.errors import NumericalError


class Block(nn.Module):
    """Two linears that read one tensor, one that reads their product, one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.idle, self.down, self.up, self.gate = (nn.Linear(4, 4, bias=False) for _ in range(4))
        self.runs = 0

    def forward(self, hidden: Tensor, scale: float, *, shift: float) -> Tensor:
        inner = hidden * scale
        result = hidden + self.down(self.gate(inner) * self.up(inner)) + shift
        self.runs += 1
        return result


@pytest.fixture
def stream() -> BlockStream:
    torch.manual_seed(0)
    hidden = HiddenStates(5, 2)
    for size in (2, 2, 1):
        hidden.append(torch.randn(size, 3, 4))
    calls = {index: BlockCall((2.0,), {"shift": float(size)}) for index, size in enumerate((2, 2, 1))}
    return BlockStream("model.layers.3", Block(), hidden, calls)


def test_inputs_are_those_that_the_linears_read(stream: BlockStream) -> None:
    block, batch = stream.block, stream.hidden[1]
    assert isinstance(block, Block)
    inputs = stream.inputs(1, ["down", "gate", "idle"])
    assert list(inputs) == ["gate", "down"], "in the order they run, without those that do not run"
    assert torch.equal(inputs["gate"], batch * 2)
    assert torch.equal(inputs["down"], block.gate(batch * 2) * block.up(batch * 2))


def test_the_forward_stops_after_the_last_input(stream: BlockStream) -> None:
    stream.inputs(0, ["gate", "up"])
    assert stream.block.runs == 0
    stream.inputs(0, ["gate", "idle"])
    assert stream.block.runs == 1
    assert not any(module._forward_pre_hooks for module in stream.block.modules())


def test_linears_are_grouped_by_the_tensor_they_read(stream: BlockStream) -> None:
    assert stream.shared_inputs(["idle", "down", "up", "gate"]) == [("up", "gate"), ("down",)]


def test_advance_replaces_the_inputs_by_the_outputs(stream: BlockStream) -> None:
    before = [batch.clone() for batch in stream.hidden]
    stream.advance()
    for index, batch in enumerate(before):
        expected = stream.block(batch, 2.0, shift=float(len(batch)))
        assert torch.equal(stream.hidden[index], expected)


def test_outputs_that_are_not_finite_are_refused_by_name(stream: BlockStream) -> None:
    assert isinstance(stream.block, Block)
    stream.block.down.weight.data.fill_(torch.inf)
    with pytest.raises(NumericalError, match=r"model\.layers\.3"):
        stream.advance()
