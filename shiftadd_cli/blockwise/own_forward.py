"""A model's own forward with one block in memory at a time, and the arguments that it passes to each block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shiftadd_cli.blockwise.calls import Path, hidden_of, leaves, rebuilt
from shiftadd_cli.blockwise.forward import StopForward, check_finite, check_weights, hooked, predict, split_call
from shiftadd_cli.blockwise.model import BlockwiseModel
from shiftadd_cli.errors import ShiftaddError, SourceError, first_line
from shiftadd_cli.source import LinearSpec, Structure
from shiftadd_cli.source.weight_reads import watching_weights


@dataclass
class OwnCall:
    """One block's call in the model's own forward.

    Attributes:
        tree: its arguments before the call, in copied containers; before, after: their leaves before and after it.
        others: its outputs other than hidden states, by path; None where it returns the hidden states bare.
    """

    tree: dict[str, Any]
    before: dict[Path, Any]
    after: dict[Path, Any] = field(default_factory=dict)
    others: dict[Path, Any] | None = None


def run_own_forward(
    blockwise: BlockwiseModel,
    sample: Tensor,
    left: Callable[[nn.Module, OwnCall, Tensor, Tensor], None],
    text: str,
    *,
    with_head: bool,
) -> Tensor | None:
    """Run the model's own forward, with its progress under `text`; returns its predictions if it runs `with_head`.

    left: called after each block, which is still in memory, with its call and the hidden states before and after it.
    """
    model, structure, names = blockwise.skeleton, blockwise.structure, blockwise.names
    shown = iter(blockwise.context.progress(names, text))
    calls: list[OwnCall] = []
    previous: list[Tensor] = []
    watched: list[set[str]] = []
    watch = ExitStack()
    linears_of: dict[int, list[LinearSpec]] = {}
    for spec in structure.linears:
        linears_of.setdefault(spec.block, []).append(spec)

    def before(name: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        check_order(model, structure, name, len(calls))
        next(shown, None)
        hidden, rest, named = split_call(args, kwargs)
        if previous and not torch.equal(previous.pop(), hidden):
            raise SourceError(
                f"{type(model).__name__} changes the hidden states before {name}; its architecture is not supported."
            )
        arguments = {"args": rest, "kwargs": named}
        check_weights(blockwise.load(len(calls)), name)
        calls.append(OwnCall(rebuilt(arguments, lambda _, leaf: leaf), dict(leaves(arguments))))
        linears = {spec.name: model.get_submodule(spec.name) for spec in linears_of.get(len(calls) - 1, ())}
        watched.append(watch.enter_context(watching_weights(block, linears)))

    def after(name: str, block: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        watch.close()
        for spec in linears_of.get(len(calls) - 1, ()):
            if spec.name in watched[-1]:
                raise SourceError(
                    f"{type(model).__name__} uses the weight of {spec.name} itself, so this layer cannot be "
                    f"compressed; exclude it with `skip='*.{spec.kind}'`."
                )
        call, result = calls[-1], hidden_of(output)
        check_finite(result, name)
        entered, rest, named = split_call(args, kwargs)
        call.after = dict(leaves({"args": rest, "kwargs": named}))
        if isinstance(output, (tuple, list)):
            call.others = {("output", number): leaf for number, leaf in enumerate(output) if number}
        # A model may modify the output of a block in place.
        previous[:] = [result.clone()]
        left(block, call, entered, result)
        blockwise.release(len(calls) - 1)
        if name == names[-1]:
            next(shown, None)
            if not with_head:
                raise StopForward

    handles = []
    for name in names:
        block = model.get_submodule(name)
        handles.append(
            block.register_forward_pre_hook(lambda m, a, k, name=name: before(name, m, a, k), with_kwargs=True)
        )
        handles.append(
            block.register_forward_hook(lambda m, a, k, o, name=name: after(name, m, a, k, o), with_kwargs=True)
        )
    values = None
    with refusing_failures(model), watch, hooked(handles), suppress(StopForward), torch.no_grad():
        values = predict(model, sample.to(blockwise.device)).values
    check_count(model, structure, len(calls))
    return values


@contextmanager
def refusing_failures(model: Any) -> Iterator[None]:
    """Turn errors of the model's code, run on samples alone or without its blocks, into SourceError."""
    try:
        yield
    except (ShiftaddError, StopForward, MemoryError):
        raise
    except Exception as error:  # model code can fail in any way
        raise SourceError(
            f"{type(model).__name__} cannot be run block by block ({first_line(error)}); its architecture is "
            "not supported."
        ) from error


def check_order(model: Any, structure: Structure, name: str, done: int) -> None:
    """Refuse a block that is not the next one after `done` blocks."""
    names = structure.blocks
    if done >= len(names) or name != names[done]:
        again = "more than once" if name in names[:done] else "out of order"
        raise SourceError(f"{type(model).__name__} calls its block {name} {again}; its architecture is not supported.")


def check_count(model: Any, structure: Structure, done: int) -> None:
    """Refuse a forward that called `done` blocks, unless these are all."""
    if done != len(structure.blocks):
        raise SourceError(
            f"{type(model).__name__} calls {done} of its {len(structure.blocks)} blocks "
            f"({structure.blocks[done]} is not called); its architecture is not supported."
        )
