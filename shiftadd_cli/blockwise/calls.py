"""A block's call: the state that enters it, the state that leaves it, and all its other arguments.

The state between two blocks is their hidden states and, where a block computes something that later blocks read (keys
and values that several layers share), those tensors too. It is packed into one tensor `[batch, tokens, width]`, so that
whatever stores, sends or differentiates hidden states does the same for every model:

    hidden states                      [batch, tokens, width]          as they are
    several streams (Gemma 3n)         [streams, batch, tokens, width] → [batch, tokens, streams * width]
    hidden states and shared tensors   one after another in the last axis

Arguments are trees of tuples, lists and mappings. A path is the way to a leaf: `("hidden_states",)` is a keyword
argument, `(0,)` the first positional argument behind the hidden states.
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
    """A copy of the tree, its containers included, with `leaf(path, value)` for every leaf."""
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
    """For `rebuilt`: what stands for the leaf at this path, or the leaf itself."""
    return stand_ins.get(path, leaf)


def at_path(tree: Any, path: Path) -> Any:
    """The part of the tree at this path."""
    for key in path:
        tree = tree[key]
    return tree


@dataclass(frozen=True)
class Carried:
    """In the place of an argument: the tensor of this number among those that the entering state carries."""

    number: int


@dataclass(frozen=True)
class Spilled:
    """In the place of an argument: a tensor that waits in a file."""

    file: TensorFile
    key: Any
    device: torch.device

    def load(self) -> Tensor:
        """The tensor, on the device of the run."""
        return self.file[self.key].to(self.device)


class Layout(NamedTuple):
    """Where a tensor of hidden states has its batch and its tokens, and the sizes of its other axes in order; `rest`
    is None for `[batch, tokens, width]`."""

    batch: int = 0
    tokens: int = 1
    rest: tuple[int, ...] | None = None

    def pack(self, hidden: Tensor) -> Tensor:
        """`[batch, tokens, width]` of hidden states."""
        if self.rest is None:
            return hidden
        return hidden.movedim((self.batch, self.tokens), (0, 1)).flatten(2)

    def unpack(self, packed: Tensor) -> Tensor:
        """Hidden states of `[batch, tokens, width]`, for any number of samples and tokens."""
        if self.rest is None:
            return packed
        return packed.unflatten(2, self.rest).movedim((0, 1), (self.batch, self.tokens))


PLAIN_LAYOUT = Layout()


class CarriedForm(NamedTuple):
    """A tensor that the state carries beside hidden states: shape without the batch, which is its first axis."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class StateForm:
    """How the state between two blocks is packed.

    `hidden` is the dtype of the hidden states, which only matters where other tensors are `carried`: these are promoted
    to one dtype with them, which loses nothing, and returned to their own. Whole numbers, such as numbers of tokens,
    become floats of 32 bits.
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
                raise ValueError("a block hands later blocks whole numbers that a float of 32 bits does not hold")
            # Each takes a whole number of values for every token.
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
    """One call of a block: all arguments besides hidden states, which come first, and both states.

    Attributes:
        args, kwargs: trees with `Carried` and `Spilled` in the places of tensors that are elsewhere.
        carried_from: for each tensor that the leaving state carries, where it comes from: the number of one that
            entered, or the path where the block left it, below ("args",), ("kwargs",) or ("output",).
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    entering: StateForm = PLAIN
    leaving: StateForm = PLAIN
    carried_from: tuple[int | Path, ...] = ()

    def run(self, block: Callable[..., Any], state: Tensor) -> Tensor:
        """The state that leaves `block` for the state that enters it, both `[batch, tokens, width]`."""
        hidden, entered = self.entering.unpack(state)
        arguments: dict[str, Any] = {"args": self.args, "kwargs": self.kwargs}
        if self._has_stand_ins:
            # Containers are copied with it: what a block writes into one must not reach its next run.
            arguments = rebuilt(arguments, lambda _, leaf: _resolved(leaf, entered))
        output = block(hidden, *arguments["args"], **arguments["kwargs"])
        results = {**arguments, "output": output}
        carried = [
            entered[origin] if isinstance(origin, int) else at_path(results, origin) for origin in self.carried_from
        ]
        return self.leaving.pack(hidden_of(output), carried)

    @property
    def hands_on(self) -> bool:
        """Whether the block computes something for later blocks besides its hidden states."""
        return any(not isinstance(source, int) for source in self.carried_from)

    @cached_property
    def _has_stand_ins(self) -> bool:
        values = [*self.args, *self.kwargs.values()]
        return any(isinstance(value, (list, MutableMapping)) for value in values) or any(
            isinstance(leaf, (Carried, Spilled)) for _, leaf in leaves(values)
        )


def hidden_of(output: Any) -> Tensor:
    """Hidden states of a block's output: it returns them bare or as the first of a tuple."""
    return output[0] if isinstance(output, (tuple, list)) else output


def _resolved(leaf: Any, entered: Sequence[Tensor]) -> Any:
    if isinstance(leaf, Carried):
        return entered[leaf.number]
    return leaf.load() if isinstance(leaf, Spilled) else leaf


def argument_name(path: Path) -> str:
    """What a message calls the argument at this path."""
    keys = [str(key) for key in path if key not in ("args", "kwargs")]
    return ".".join(keys) if keys else "hidden_states"
