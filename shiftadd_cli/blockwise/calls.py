"""A block's call: the state that enters it, the state that leaves it, and all other arguments.

The state between two blocks is the hidden states plus any tensors that one block computes and later blocks read (keys
and values that several layers share). It is packed into one tensor `[batch, tokens, width]`, so that the code that
stores, sends or differentiates hidden states is the same for every model:

    hidden states                      [batch, tokens, width]          unchanged
    several streams (Gemma 3n)         [streams, batch, tokens, width] → [batch, tokens, streams * width]
    hidden states and shared tensors   concatenated along the last axis

Arguments are trees of tuples, lists and mappings. A path leads to a leaf: `("hidden_states",)` is a keyword
argument, `(0,)` the first positional argument after the hidden states.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shiftadd_cli.blockwise.tensor_file import TensorFile

Path = tuple[Any, ...]


def leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every leaf of a tree of arguments with its path."""
    if isinstance(tree, MutableMapping):
        for key, value in tree.items():
            yield from leaves(value, (*path, key))
    elif isinstance(tree, (tuple, list)):
        for number, value in enumerate(tree):
            yield from leaves(value, (*path, number))
    else:
        yield path, tree


def rebuilt(tree: Any, leaf: Callable[[Path, Any], Any], path: Path = ()) -> Any:
    """A copy of the tree, including its containers, with every leaf replaced by `leaf(path, value)`."""
    if isinstance(tree, MutableMapping):
        twin = copy.copy(tree)
        for key, value in tree.items():
            twin[key] = rebuilt(value, leaf, (*path, key))
        return twin
    if isinstance(tree, (tuple, list)):
        values = [rebuilt(value, leaf, (*path, number)) for number, value in enumerate(tree)]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    return leaf(path, tree)


def substituted(stand_ins: Mapping[Path, Any], path: Path, leaf: Any) -> Any:
    """For `rebuilt`: the stand-in for the leaf at this path, or the leaf itself."""
    return stand_ins.get(path, leaf)


def at_path(tree: Any, path: Path) -> Any:
    """The part of the tree at this path."""
    for key in path:
        tree = tree[key]
    return tree


@dataclass(frozen=True)
class Carried:
    """Replaces an argument: the tensor with this number among those that the entering state carries."""

    number: int


@dataclass(frozen=True)
class Spilled:
    """Replaces an argument: a tensor that is stored in a file."""

    file: TensorFile
    key: Any
    device: torch.device

    def load(self) -> Tensor:
        """The tensor, on the device of the run."""
        return self.file[self.key].to(self.device)


class Layout(NamedTuple):
    """The axes of batch and tokens in a tensor of hidden states, and the sizes of the other axes in order; `rest` is
    None for `[batch, tokens, width]`."""

    batch: int = 0
    tokens: int = 1
    rest: tuple[int, ...] | None = None

    def pack(self, hidden: Tensor) -> Tensor:
        """Hidden states packed as `[batch, tokens, width]`."""
        if self.rest is None:
            return hidden
        return hidden.movedim((self.batch, self.tokens), (0, 1)).flatten(2)

    def unpack(self, packed: Tensor) -> Tensor:
        """Hidden states unpacked from `[batch, tokens, width]`, for any number of samples and tokens."""
        if self.rest is None:
            return packed
        return packed.unflatten(2, self.rest).movedim((0, 1), (self.batch, self.tokens))


PLAIN_LAYOUT = Layout()


class CarriedForm(NamedTuple):
    """A tensor that the state carries in addition to hidden states: its shape without the first axis, the batch."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class StateForm:
    """How the state between two blocks is packed.

    `hidden` is the dtype of the hidden states. It matters only where other tensors are `carried`: all are promoted to
    one common dtype, which loses nothing, and converted back later. Integers, such as token numbers, become float32.
    """

    layout: Layout = PLAIN_LAYOUT
    hidden: torch.dtype = torch.float32
    carried: tuple[CarriedForm, ...] = ()

    def pack(self, hidden: Tensor, carried: Sequence[Tensor] = ()) -> Tensor:
        """One tensor `[batch, tokens, width]` of hidden states and the carried tensors."""
        packed = self.layout.pack(hidden)
        if not self.carried:
            return packed
        dtype = packed.dtype
        for form in self.carried:
            dtype = torch.promote_types(dtype, form.dtype if form.dtype.is_floating_point else torch.float32)
        batch, tokens = packed.shape[:2]
        parts = [packed.to(dtype)]
        for tensor in carried:
            values = tensor.to(dtype).reshape(batch, -1)
            if not tensor.is_floating_point() and not torch.equal(values.to(tensor.dtype), tensor.reshape(batch, -1)):
                raise ValueError("a block passes whole numbers to later blocks that float32 cannot represent")
            # Each tensor is padded to a whole number of values per token.
            padded = torch.nn.functional.pad(values, (0, -values.shape[1] % tokens))
            parts.append(padded.view(batch, tokens, -1))
        return torch.cat(parts, -1)

    def unpack(self, state: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Hidden states as the model has them, and the carried tensors."""
        if not self.carried:
            return self.layout.unpack(state), []
        batch, tokens = state.shape[:2]
        widths = [-(-prod(form.shape) // tokens) for form in self.carried]
        hidden, *parts = state.split([state.shape[-1] - sum(widths), *widths], -1)
        carried = [
            part.reshape(batch, -1)[:, : prod(form.shape)].view(batch, *form.shape).to(form.dtype)
            for form, part in zip(self.carried, parts, strict=True)
        ]
        return self.layout.unpack(hidden.to(self.hidden)), carried


PLAIN = StateForm()


@dataclass(frozen=True)
class BlockCall:
    """One call of a block: all arguments except hidden states, which come first, and the forms of both states.

    Attributes:
        args, kwargs: trees with `Carried` and `Spilled` in place of tensors that are stored elsewhere.
        carried_from: the origin of each tensor that the leaving state carries: the number of an entering tensor, or
            the path where the block left it, below ("args",), ("kwargs",) or ("output",).
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    entering: StateForm = PLAIN
    leaving: StateForm = PLAIN
    carried_from: tuple[int | Path, ...] = ()

    def run(self, block: Callable[..., Any], state: Tensor) -> Tensor:
        """Run `block` on the entering state; returns the leaving state. Both are `[batch, tokens, width]`."""
        hidden, entered = self.entering.unpack(state)
        arguments: dict[str, Any] = {"args": self.args, "kwargs": self.kwargs}
        if self._has_stand_ins:
            # This also copies the containers: a block's changes to them must not reach its next run.
            arguments = rebuilt(arguments, lambda _, leaf: _resolved(leaf, entered))
        output = block(hidden, *arguments["args"], **arguments["kwargs"])
        results = {**arguments, "output": output}
        carried = [
            entered[origin] if isinstance(origin, int) else at_path(results, origin) for origin in self.carried_from
        ]
        return self.leaving.pack(hidden_of(output), carried)

    @property
    def hands_on(self) -> bool:
        """Whether the block computes tensors for later blocks in addition to its hidden states."""
        return any(not isinstance(source, int) for source in self.carried_from)

    @cached_property
    def _has_stand_ins(self) -> bool:
        values = [*self.args, *self.kwargs.values()]
        return any(isinstance(value, (list, MutableMapping)) for value in values) or any(
            isinstance(leaf, (Carried, Spilled)) for _, leaf in leaves(values)
        )


def hidden_of(output: Any) -> Tensor:
    """The hidden states in a block's output, which is either bare or a tuple that begins with them."""
    return output[0] if isinstance(output, (tuple, list)) else output


def _resolved(leaf: Any, entered: Sequence[Tensor]) -> Any:
    if isinstance(leaf, Carried):
        return entered[leaf.number]
    return leaf.load() if isinstance(leaf, Spilled) else leaf


def argument_name(path: Path) -> str:
    """The name of the argument at this path, for messages."""
    keys = [str(key) for key in path if key not in ("args", "kwargs")]
    return ".".join(keys) if keys else "hidden_states"
