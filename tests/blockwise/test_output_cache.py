"""A block that plays back finished outputs gives the results of one that computes everything, with less work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from shiftadd_cli.blockwise.block_runner import BlockStream
from shiftadd_cli.blockwise.calls import BlockCall
from shiftadd_cli.blockwise.hidden_states import HiddenStates
from shiftadd_cli.blockwise.output_cache import OutputCache
from shiftadd_cli.blockwise.tensor_file import TensorFile

WIDTH = 8
TURNS = (("attention.q", "attention.k"), ("attention.o",), ("mlp.up",), ("mlp.down",))


class Attention(nn.Module):
    """As in transformers, the output is a tuple, here without attention weights."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        return self.o(torch.softmax(self.q(hidden) @ self.k(hidden).transpose(-1, -2), -1) @ hidden), None


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(hidden)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention, self.mlp = nn.LayerNorm(WIDTH), Attention(), Mlp()

    def forward(self, hidden: Tensor) -> Tensor:
        attended, _ = self.attention(self.norm(hidden))
        # This is in place, and must not change the recorded outputs.
        attended += hidden
        return attended + self.mlp(self.norm(attended))


@pytest.fixture
def file() -> Iterator[TensorFile]:
    with TensorFile() as tensor_file:
        yield tensor_file


def stream_of(block: nn.Module, playback: OutputCache | None) -> BlockStream:
    generator = torch.Generator().manual_seed(1)
    hidden = HiddenStates(5, 2)
    for size in (2, 2, 1):
        hidden.append(torch.randn(size, 3, WIDTH, generator=generator))
    calls = {index: BlockCall((), {}) for index in range(3)}
    return BlockStream("block", block.eval(), hidden, calls, playback=playback)


def count_calls(block: nn.Module) -> Counter[str]:
    """Count how often each linear of a block computes."""
    counts: Counter[str] = Counter()
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):

            def forward(input: Tensor, name: str = name, module: nn.Linear = module) -> Tensor:
                counts[name] += 1
                return nn.functional.linear(input, module.weight, module.bias)

            module.forward = forward  # type: ignore[method-assign]
    return counts


def test_inputs_equal_those_without_playback(file: TensorFile) -> None:
    torch.manual_seed(0)
    block = Block()
    counts = count_calls(block)
    playback = OutputCache(block, [name for turn in TURNS for name in turn], file)
    playing, plain = stream_of(block, playback), stream_of(block, None)
    for turn in TURNS:
        for index in range(3):
            counts.clear()
            inputs = playing.inputs(index, turn)
            computed = counts.copy()
            expected = plain.inputs(index, turn)
            assert inputs.keys() == expected.keys() == set(turn)
            assert all(torch.equal(inputs[name], expected[name]) for name in turn)
            if turn == ("mlp.down",):
                assert computed == {"mlp.up": 1}, "attention was played back as a whole"
        for name in turn:
            with torch.no_grad():
                block.get_parameter(f"{name}.weight").mul_(0.9)
        playback.finish(turn)
    counts.clear()
    playing.advance()
    assert counts == {"mlp.down": 3}, "all other outputs were played back"
    plain.advance()
    assert all(torch.equal(one, other) for one, other in zip(playing.hidden, plain.hidden, strict=True))


def test_playback_leaves_the_block_unchanged(file: TensorFile) -> None:
    block = Block()
    own = block.attention.q.forward = block.attention.q.forward  # type: ignore[method-assign]
    playback = OutputCache(block, ["attention.q", "attention.k", "attention.o"], file)
    stream = stream_of(block, playback)
    playback.finish(["attention.q", "attention.k"])
    for _ in range(2):
        stream.inputs(0, ["attention.o"])
        assert block.attention.q.__dict__["forward"] is own
        assert "forward" not in block.attention.k.__dict__
        assert not any(module._forward_hooks for module in block.modules())


class Twice(nn.Module):
    """Runs one linear on two tensors, and has a module whose output is not a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.pair, self.last = nn.Linear(WIDTH, WIDTH), Pair(), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        once = self.shared(hidden)
        return self.last(self.shared(once) + self.pair(once)["first"])


class Silent(nn.Linear):
    """A linear that returns nothing."""

    def forward(self, input: Tensor) -> None:  # type: ignore[override]
        super().forward(input)


def test_a_module_without_an_output_is_computed(file: TensorFile) -> None:
    silent, last = Silent(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    block = nn.Sequential()
    block.add_module("silent", silent)
    block.add_module("last", last)
    block.forward = lambda hidden: last(hidden) if silent(hidden) is None else None  # type: ignore[method-assign]
    playback = OutputCache(block, ["silent", "last"], file)
    playback.finish(["silent"])
    stream = stream_of(block, playback)
    for _ in range(2):
        assert torch.equal(stream.inputs(0, ["last"])["last"], stream.hidden[0])


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> dict[str, Tensor]:
        return {"first": self.inner(hidden)}


def test_later_calls_are_computed_and_parts_of_other_outputs_are_played_back(file: TensorFile) -> None:
    torch.manual_seed(0)
    block = Twice()
    counts = count_calls(block)
    playback = OutputCache(block, ["shared", "pair.inner", "last"], file)
    playing, plain = stream_of(block, playback), stream_of(block, None)
    playback.finish(["shared", "pair.inner"])
    for _ in range(3):
        counts.clear()
        inputs = playing.inputs(0, ["last"])["last"]
        computed = counts.copy()
        assert torch.equal(inputs, plain.inputs(0, ["last"])["last"])
    assert computed == {"shared": 1}
