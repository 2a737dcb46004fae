"""The tensors that pass between the blocks of a model, found in its own forward and checked against it.

Two samples run through the model's own forward, with one block loaded at a time. The first shows the tensors that pass
from block to block. The second is also run block by block, from recorded calls, and both runs must agree in the inputs
of every block, in every argument, and in the predictions. A model that does not agree is refused, so that no model is
calibrated on wrong inputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shiftadd_cli.blockwise.calls import (
    PLAIN_LAYOUT,
    BlockCall,
    Carried,
    CarriedForm,
    Layout,
    Path,
    StateForm,
    argument_name,
    leaves,
    rebuilt,
    substituted,
)
from shiftadd_cli.blockwise.forward import StopForward, first_input, hooked, run_model, split_call
from shiftadd_cli.blockwise.head import Form, Head, standing_in
from shiftadd_cli.blockwise.model import BlockwiseModel
from shiftadd_cli.blockwise.own_forward import OwnCall, check_count, check_order, refusing_failures, run_own_forward
from shiftadd_cli.errors import SourceError
from shiftadd_cli.source import Structure

# Largest relative difference between two runs of a block on the same inputs: some kernels add in any order.
_ROUNDING = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
# Upper limit for the predictions of the second sample, including all copies that a model makes of its logits.
LOGIT_BYTES = 1 << 30
BYTES_PER_LOGIT = 12


@dataclass
class Passage:
    """The tensors that pass between the blocks of a model.

    Attributes:
        trees: the arguments of each block, with `Carried` where they come from other blocks.
        states: forms of the states before the first block, between blocks and after the last.
        carried_from: for each block, see `BlockCall`.
        forms: the form of each block's output.
    """

    blockwise: BlockwiseModel
    trees: list[dict[str, Any]] = field(default_factory=list)
    states: list[StateForm] = field(default_factory=list)
    carried_from: list[tuple[int | Path, ...]] = field(default_factory=list)
    forms: list[Form] = field(default_factory=list)

    @classmethod
    def of(cls, model: BlockwiseModel, samples: Tensor) -> Passage:
        """The passage that the first sample shows in the model's own forward."""
        passage = cls(model)
        layout = passage._layout(samples)
        own: list[OwnCall] = []

        def record(_: nn.Module, call: OwnCall, entered: Tensor, output: Tensor) -> None:
            own.append(call)
            before, after = (tuple(layout.pack(hidden).shape[1:]) for hidden in (entered, output))
            others = None if call.others is None else len(call.others)
            passage.forms.append(Form(before, after, others, output.dtype, layout))

        run_own_forward(model, samples[:1], record, "Tracing", with_head=False)
        passage._follow(own, layout)
        _, recorded = passage.arguments(samples[:1])
        passage._compare_arguments(own, recorded)
        return passage

    @property
    def model(self) -> Any:
        return self.blockwise.skeleton

    @property
    def structure(self) -> Structure:
        return self.blockwise.structure

    @property
    def device(self) -> torch.device:
        return self.blockwise.device

    def call(self, depth: int, leaf: Callable[[Path, Any], Any]) -> BlockCall:
        """The call of block number `depth`, with `leaf(path, value)` for arguments that come from no other block."""
        tree = rebuilt(
            self.trees[depth], lambda path, value: value if isinstance(value, Carried) else leaf(path, value)
        )
        return BlockCall(
            tree["args"], tree["kwargs"], self.states[depth], self.states[depth + 1], self.carried_from[depth]
        )

    def recorded_call(self, depth: int, arguments: Sequence[Mapping[Path, Any]]) -> BlockCall:
        """The same call, with the leaves that `arguments` recorded."""
        return self.call(depth, partial(substituted, arguments[depth]))

    def arguments(self, samples: Tensor) -> tuple[Tensor, list[dict[Path, Any]]]:
        """The hidden states that enter the first block, and the argument leaves of every block, for a batch."""
        entered: list[Tensor] = []
        arguments: list[dict[Path, Any]] = []
        names = self.structure.blocks

        def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            check_order(self.model, self.structure, name, len(arguments))
            hidden, rest, named = split_call(args, kwargs)
            if not entered:
                entered.append(hidden)
            arguments.append(dict(leaves({"args": rest, "kwargs": named})))
            if len(arguments) == len(names):
                raise StopForward

        blocks = [self.model.get_submodule(name) for name in names]
        handles = [
            block.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: note(name, args, kwargs), with_kwargs=True
            )
            for name, block in zip(names, blocks, strict=True)
        ]
        with (
            refusing_failures(self.model),
            standing_in(blocks, self.forms),
            hooked(handles),
            suppress(StopForward),
            torch.no_grad(),
        ):
            run_model(self.model, samples.to(self.device))
        check_count(self.model, self.structure, len(arguments))
        return entered[0], arguments

    def cut(self, samples: Tensor) -> Tensor:
        """Texts, cut so that the predictions of one of them fit in memory at once."""
        if self.blockwise.source.reads_images:
            return samples
        vocabulary = self.model.config.get_text_config().vocab_size
        return samples[:, : max(1, LOGIT_BYTES // (BYTES_PER_LOGIT * vocabulary))]

    def check(self, sample: Tensor) -> None:
        """Run one sample through the model's own forward and through recorded calls, and compare the results.

        Raises SourceError at the first difference, naming the block and, where an argument differs, the argument.
        """
        sample = self.cut(sample)
        entering, recorded = self.arguments(sample)
        state = self.states[0].pack(entering)
        own: list[OwnCall] = []

        def compare(block: nn.Module, call: OwnCall, entered: Tensor, output: Tensor) -> None:
            nonlocal state
            depth, name = len(own), self.structure.blocks[len(own)]
            hidden, carried = self.states[depth].unpack(state)
            self._compare(hidden, entered, f"The input of {name}")
            for path, leaf in leaves(self.trees[depth]):
                if isinstance(leaf, Carried):
                    self._compare(carried[leaf.number], call.before[path], f"{argument_name(path)} of {name}")
            replayed = self.recorded_call(depth, recorded)
            with torch.no_grad():
                # Calling the block itself would run the hooks of the model's own forward.
                state = replayed.run(block.forward, state)
            self._compare(self.states[depth + 1].unpack(state)[0], output, f"The output of {name}")
            own.append(call)

        logits = run_own_forward(self.blockwise, sample, compare, "Checking", with_head=True)
        self._compare_arguments(own, recorded)
        head = Head(self.blockwise, self.forms, sample)
        tokens = state.shape[1]
        # In slices, as in the passes over predictions: a head that mixes tokens then shows a difference.
        parts = list(head.parts(1, tokens, max(1, -(-tokens // 2))))
        with refusing_failures(self.model), torch.no_grad():
            values = [head.predict(state[rows, cut], rows, cut).values for rows, cut in parts]
        assert logits is not None, "the forward stopped before its end"
        self._compare(torch.cat(values, 1) if len(values) > 1 else values[0], logits, "The output of the head")

    def _layout(self, samples: Tensor) -> Layout:
        """The layout of hidden states; where their axes are ambiguous, samples of other sizes show it."""

        def entering(inputs: Tensor) -> Tensor:
            with refusing_failures(self.model):
                return first_input(self.blockwise, inputs)

        hidden = entering(samples[:1])
        usual = hidden.ndim == 3 and len(hidden) == 1
        if usual and (self.blockwise.source.reads_images or hidden.shape[1] == samples.shape[1]):
            return PLAIN_LAYOUT
        batch = _grown_axis(hidden, entering(samples[:1].repeat(2, *[1] * (samples.ndim - 1))))
        tokens = None
        if not self.blockwise.source.reads_images and samples.shape[1] > 1:
            tokens = _grown_axis(entering(samples[:1, :-1]), hidden)
        if batch is None or tokens is None:
            raise SourceError(
                f"The hidden states of {type(self.model).__name__} have shape {list(hidden.shape)} for one sample, in "
                "which samples and tokens have no axes of their own; its architecture is not supported."
            )
        rest = tuple(size for axis, size in enumerate(hidden.shape) if axis not in (batch, tokens))
        return Layout(batch, tokens, rest)

    def _follow(self, own: Sequence[OwnCall], layout: Layout) -> None:
        """Find the arguments that earlier blocks computed, and the forms of all states."""
        # All of these tensors are alive, so no two share an id.
        produced: dict[int, tuple[int, Path, Tensor]] = {}
        origins: list[dict[Path, int]] = []
        for depth, call in enumerate(own):
            origins.append({path: id(leaf) for path, leaf in call.before.items() if id(leaf) in produced})
            given = {id(leaf) for leaf in call.before.values()}
            for path, leaf in [*(call.others or {}).items(), *call.after.items()]:
                if isinstance(leaf, Tensor) and id(leaf) not in given:
                    produced[id(leaf)] = (depth, path, leaf)
        last_use = {key: depth for depth, keys in enumerate(origins) for key in keys.values()}
        entering: list[int] = []
        self.states = [StateForm(layout)]
        for depth, call in enumerate(own):
            numbers = {key: number for number, key in enumerate(entering)}
            carried = {path: Carried(numbers[key]) for path, key in origins[depth].items()}
            self.trees.append(rebuilt(call.tree, partial(substituted, carried)))
            fresh = [key for key, (block, *_) in produced.items() if block == depth]
            leaving = [key for key in [*entering, *fresh] if last_use.get(key, 0) > depth]
            self.carried_from.append(tuple(numbers[key] if key in numbers else produced[key][1] for key in leaving))
            forms = tuple(self._carried_form(produced[key][2], depth) for key in leaving)
            self.states.append(StateForm(layout, self.forms[depth].dtype, forms))
            entering = leaving

    def _carried_form(self, tensor: Tensor, depth: int) -> CarriedForm:
        if tensor.ndim < 2 or len(tensor) != 1:
            raise SourceError(
                f"{self.structure.blocks[depth]} passes a tensor of shape {list(tensor.shape)} "
                f"({tensor.dtype}) to later blocks, and its first axis is not the samples; its architecture is not "
                "supported."
            )
        return CarriedForm(tuple(tensor.shape[1:]), tensor.dtype)

    def _compare_arguments(self, own: Sequence[OwnCall], recorded: Sequence[Mapping[Path, Any]]) -> None:
        """Refuse arguments that blocks change or compute in a way that cannot be traced."""
        for depth, call in enumerate(own):
            name = self.structure.blocks[depth]
            tree = dict(leaves(self.trees[depth]))
            given = {path for path, leaf in tree.items() if not isinstance(leaf, Carried)}
            for path in given ^ (recorded[depth].keys() - (tree.keys() - given)):
                raise self._dependent(path, name)
            for path in given:
                replayed, original = recorded[depth][path], call.before[path]
                if isinstance(replayed, Tensor) and isinstance(original, Tensor):
                    if replayed.shape != original.shape or not same_values(replayed, original):
                        raise self._dependent(path, name)
                elif type(replayed) is not type(original) or (_is_plain(replayed) and replayed != original):
                    raise self._dependent(path, name)

    def _dependent(self, path: Path, block: str) -> SourceError:
        return SourceError(
            f"The argument {self._argument(path, block)} of {block} depends on the outputs of other blocks in a way "
            f"that cannot be traced; {type(self.model).__name__} is not supported."
        )

    def _argument(self, path: Path, block: str) -> str:
        """The name of an argument; for a positional one, the name of its parameter."""
        if len(path) > 1 and path[0] == "args":
            names = list(inspect.signature(self.model.get_submodule(block).forward).parameters)
            if path[1] + 1 < len(names):
                path = (names[path[1] + 1], *path[2:])
        return argument_name(path)

    def _compare(self, replayed: Tensor, own: Tensor, subject: str) -> None:
        """Refuse a difference beyond rounding."""
        model = type(self.model).__name__
        if replayed.shape != own.shape:
            raise SourceError(
                f"{subject} has shape {list(own.shape)} in the forward of {model} and {list(replayed.shape)} where its "
                "blocks run one by one; its architecture is not supported."
            )
        scale, difference = float(own.float().norm()), float((replayed.float() - own.float()).norm())
        if not difference <= _ROUNDING.get(own.dtype, 1e-4) * max(scale, 1e-30):
            share = difference / scale if scale else float("inf")
            raise SourceError(
                f"{subject} differs by {share:.1%} between the forward of {model} and its blocks run one by one, so it "
                "would be calibrated on wrong inputs; its architecture is not supported."
            )


def _grown_axis(small: Tensor, large: Tensor) -> int | None:
    """The only axis in which the sizes differ; None where there is no such axis or more than one."""
    if small.ndim != large.ndim:
        return None
    grown = [axis for axis in range(small.ndim) if small.shape[axis] != large.shape[axis]]
    return grown[0] if len(grown) == 1 else None


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape hold the same values; NaN equals NaN."""
    if one.dtype != other.dtype:
        return False
    if torch.equal(one, other):
        return True
    return one.is_floating_point() and bool(((one == other) | (one.isnan() & other.isnan())).all())


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device))
