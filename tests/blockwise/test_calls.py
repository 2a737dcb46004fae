"""States survive packing into one tensor, and a block runs from recorded arguments as it does in the model."""

from __future__ import annotations

import copy
from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from shiftadd_cli.blockwise.calls import (
    BlockCall,
    Carried,
    CarriedForm,
    Layout,
    Spilled,
    StateForm,
    argument_name,
    at_path,
    leaves,
    rebuilt,
)
from shiftadd_cli.blockwise.tensor_file import TensorFile

# The calls of a block that writes a tensor and of one that reads it, and the file of spilled arguments.
Calls = tuple[BlockCall, BlockCall, TensorFile]

SIZES = st.integers(1, 4)


@given(axes=st.permutations(range(4)), batch=SIZES, tokens=SIZES, rest=st.tuples(SIZES, SIZES))
def test_hidden_states_of_any_layout_are_packed_sample_after_sample(
    axes: list[int], batch: int, tokens: int, rest: tuple[int, int]
) -> None:
    batch_axis, tokens_axis, *others = axes
    shape = [0] * 4
    shape[batch_axis], shape[tokens_axis] = batch, tokens
    for axis, size in zip(sorted(others), rest, strict=True):
        shape[axis] = size
    hidden = torch.arange(torch.Size(shape).numel()).reshape(shape).float()
    layout = Layout(batch_axis, tokens_axis, tuple(shape[axis] for axis in sorted(others)))
    packed = layout.pack(hidden)
    assert packed.shape == (batch, tokens, rest[0] * rest[1])
    assert torch.equal(layout.unpack(packed), hidden)
    for sample in range(batch):
        for token in range(tokens):
            values = hidden.select(batch_axis, sample).select(tokens_axis - (tokens_axis > batch_axis), token)
            assert torch.equal(packed[sample, token], values.flatten())


SHAPES = st.lists(st.lists(SIZES, min_size=1, max_size=3), max_size=3)
DTYPES = st.permutations([torch.bfloat16, torch.float32, torch.float16])


@given(batch=SIZES, tokens=SIZES, width=SIZES, shapes=SHAPES, dtypes=DTYPES)
def test_carried_tensors_survive_packing_bit_for_bit(
    batch: int, tokens: int, width: int, shapes: list[list[int]], dtypes: list[torch.dtype]
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch, tokens, width, generator=generator).to(dtypes[-1])
    carried = [
        torch.randn(batch, *shape, generator=generator).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=False)
    ]
    form = StateForm(
        Layout(), hidden.dtype, tuple(CarriedForm(tuple(tensor.shape[1:]), tensor.dtype) for tensor in carried)
    )
    packed = form.pack(hidden, carried)
    assert packed.ndim == 3
    assert packed.shape[:2] == (batch, tokens)
    unpacked, parts = form.unpack(packed)
    assert unpacked.dtype == hidden.dtype
    assert torch.equal(unpacked, hidden)
    for part, tensor in zip(parts, carried, strict=True):
        assert part.dtype == tensor.dtype
        assert torch.equal(part, tensor)


def test_carried_integers_survive_packing_or_are_refused() -> None:
    hidden, numbers = torch.randn(2, 3, 4).bfloat16(), torch.arange(12).reshape(2, 6) * 100_003
    form = StateForm(Layout(), torch.bfloat16, (CarriedForm((6,), torch.int64),))
    unpacked, (unpacked_numbers,) = form.unpack(form.pack(hidden, [numbers]))
    assert torch.equal(unpacked, hidden)
    assert torch.equal(unpacked_numbers, numbers)
    with pytest.raises(ValueError, match="whole numbers"):
        form.pack(hidden, [numbers + 2**30 + 1])


def test_a_state_of_hidden_states_alone_is_the_tensor_itself() -> None:
    hidden = torch.randn(2, 3, 4)
    assert StateForm().pack(hidden) is hidden
    assert StateForm().unpack(hidden)[0] is hidden


def test_a_rebuilt_tree_has_the_same_leaves_in_its_own_containers() -> None:
    tree: dict[str, Any] = {"args": (1, [2, {"a": 3}]), "kwargs": {"cache": UserDict({"k": (4, 5)})}}
    twin = rebuilt(tree, lambda _, leaf: leaf)
    assert dict(leaves(twin)) == dict(leaves(tree))
    assert dict(leaves(tree))[("kwargs", "cache", "k", 1)] == 5
    assert at_path(tree, ("args", 1, 1, "a")) == 3
    twin["kwargs"]["cache"]["k"] = None
    twin["args"][1][1]["a"] = 9
    assert tree["kwargs"]["cache"]["k"] == (4, 5)
    assert tree["args"][1][1]["a"] == 3
    assert isinstance(twin["kwargs"]["cache"], UserDict)


def test_arguments_have_readable_names() -> None:
    assert argument_name(("kwargs", "per_layer_input")) == "per_layer_input"
    assert argument_name(("kwargs", "shared", "full", 0)) == "shared.full.0"


class Writer(nn.Module):
    """A block that leaves its input in a dictionary for later blocks."""

    def forward(self, hidden: Tensor, shift: Tensor, *, shared: dict[str, Any]) -> Tensor:
        shared["first"] = (hidden * 2,)
        return hidden + shift


class Reader(nn.Module):
    """A block that reads this input, and returns its hidden states in a tuple."""

    def forward(self, hidden: Tensor, *, shared: dict[str, Any]) -> tuple[Tensor, None]:
        return hidden + shared["first"][0], None


@pytest.fixture
def calls(tmp_path: Path) -> Calls:
    file = TensorFile(tmp_path)
    file["shift"] = torch.full((2, 3, 4), 5.0)
    between = StateForm(Layout(), torch.float32, (CarriedForm((3, 4), torch.float32),))
    writer = BlockCall(
        (Spilled(file, "shift", torch.device("cpu")),),
        {"shared": {}},
        leaving=between,
        carried_from=(("kwargs", "shared", "first", 0),),
    )
    return writer, BlockCall((), {"shared": {"first": (Carried(0),)}}, entering=between), file


def test_the_state_carries_tensors_from_one_block_to_another(calls: Calls) -> None:
    writer, reader, _ = calls
    hidden = torch.randn(2, 3, 4)
    state = writer.run(Writer(), hidden)
    assert state.shape == (2, 3, 8)
    assert torch.equal(reader.run(Reader(), state), hidden + 5 + 2 * hidden)
    assert writer.hands_on
    assert not reader.hands_on


def test_a_block_writes_only_into_containers_of_its_own_run(calls: Calls) -> None:
    writer, _, _ = calls
    before = copy.deepcopy(writer.kwargs)
    writer.run(Writer(), torch.randn(2, 3, 4))
    assert writer.kwargs == before


def test_gradients_pass_through_carried_tensors(calls: Calls) -> None:
    writer, reader, _ = calls
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    output = reader.run(Reader(), writer.run(Writer(), hidden))
    assert torch.equal(torch.autograd.grad(output.sum(), hidden)[0], torch.full((2, 3, 4), 3.0))
