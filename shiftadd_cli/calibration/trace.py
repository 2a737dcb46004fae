"""How a model calls its blocks: the inputs of the first block, and every other argument of every block.

The model's own forward runs once, batch by batch, up to the first block, and for one batch of each size through all
blocks, each loaded for its turn only. What a block receives besides hidden states (masks, rotary embeddings, ALiBi
biases) depends on shapes alone, so it is recorded once per batch size and used for all batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shiftadd_cli.calibration.head import Form, hidden_of, run_model
from shiftadd_cli.calibration.streams import HiddenStates
from shiftadd_cli.errors import NumericalError, SourceError
from shiftadd_cli.source import Source, Structure


@dataclass(frozen=True)
class BlockCall:
    """Arguments of a block's forward besides the hidden states, which come first."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        """Output hidden states of `block` for `hidden` `[batch, seq_len, width]`."""
        return hidden_of(block(hidden, *self.args, **self.kwargs))


@dataclass
class Trace:
    """`hidden`: inputs of the first block; `calls[batch size]`: one BlockCall per block; `forms`: what each block gives
    out; `original`: hidden states of the original model at the same depth, for asymmetric calibration and block
    reconstruction."""

    hidden: HiddenStates
    calls: dict[int, list[BlockCall]] = field(default_factory=dict)
    forms: list[Form] = field(default_factory=list)
    original: HiddenStates | None = None


class StopForward(Exception):  # noqa: N818 - control flow, not an error
    """Leaves a forward where nothing more is needed: the head's logits would cost more than all the rest."""


def trace_model(
    source: Source,
    structure: Structure,
    samples: Tensor,
    batch_size: int,
    device: torch.device,
    hidden: HiddenStates | None = None,
) -> Trace:
    """Run `samples` to the first block, and one batch of each size through all blocks.

    samples: int64 `[samples, seq_len]` tokens, or `[samples, channels, height, width]` pixels for a vision model.
    hidden: where hidden states are kept, by default in memory; batches that it holds already are not computed.

    Modules outside the blocks must be materialised on `device`; blocks are materialised and released here. Raises
    SourceError when the model does not pass hidden states straight from block to block.
    """
    model = source.skeleton()
    batches = samples.split(batch_size)
    trace = Trace(HiddenStates(len(samples)) if hidden is None else hidden)
    known = len(trace.hidden)
    for index, batch in enumerate(batches):
        if len(batch) not in trace.calls:
            trace.calls[len(batch)], trace.forms = _record_calls(source, structure, model, batch, device)
        if index >= known:
            trace.hidden.append(first_input(structure, model, batch, device))
    return trace


def check_finite(hidden: Tensor, block: str) -> None:
    """Raise NumericalError naming the block whose output holds NaN or infinite values."""
    if not torch.isfinite(hidden).all():
        dtype = str(hidden.dtype).removeprefix("torch.")
        raise NumericalError(
            f"The output of {block} is not finite in {dtype}; use --dtype float32, or mend the source."
        )


def _check_weights(block: nn.Module, name: str) -> None:
    for parameter, weight in block.named_parameters():
        if not torch.isfinite(weight).all():
            raise NumericalError(
                f"{name}.{parameter} holds values that are not finite; the source checkpoint is damaged."
            )


def first_input(structure: Structure, model: nn.Module, batch: Tensor, device: torch.device) -> Tensor:
    """What the first block is given of some samples, by a model whose parts outside the blocks are on `device`."""
    found: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(_split(args, kwargs)[0].detach())
        raise StopForward

    with hooked([model.get_submodule(structure.blocks[0]).register_forward_pre_hook(stop, with_kwargs=True)]):
        try:
            with torch.no_grad():
                run_model(model, batch.to(device))
        except StopForward:
            return found[0]
    raise SourceError(
        f"The model never calls its first block {structure.blocks[0]}; its architecture is not supported."
    )


def _record_calls(
    source: Source, structure: Structure, model: nn.Module, batch: Tensor, device: torch.device
) -> tuple[list[BlockCall], list[Form]]:
    calls: list[BlockCall] = []
    forms: list[Form] = []
    previous: list[Tensor] = []

    def before(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name != structure.blocks[len(calls)]:
            raise SourceError(f"The model calls {name} out of order; its architecture is not supported.")
        hidden, rest, named = _split(args, kwargs)
        if previous and not torch.equal(previous.pop(), hidden):
            raise SourceError(f"The model changes the hidden states before {name}; its architecture is not supported.")
        calls.append(BlockCall(rest, named))
        source.materialise([name])
        _check_weights(module, name)
        module.to(device)

    def after(name: str, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        check_finite(hidden_of(output), name)
        previous[:] = [hidden_of(output).clone()]
        forms.append(Form.of(output))
        source.release([name])
        if name == structure.blocks[-1]:
            raise StopForward

    handles = []
    for name in structure.blocks:
        block = model.get_submodule(name)
        handles.append(
            block.register_forward_pre_hook(lambda m, a, k, name=name: before(name, m, a, k), with_kwargs=True)
        )
        handles.append(block.register_forward_hook(lambda m, a, o, name=name: after(name, m, a, o)))
    with hooked(handles), suppress(StopForward), torch.no_grad():
        run_model(model, batch.to(device))
    if len(calls) != len(structure.blocks):
        raise SourceError(
            f"The model called {len(calls)} of its {len(structure.blocks)} blocks; its architecture is not supported."
        )
    return calls, forms


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Hidden states, the other positional arguments and the named ones, of a block's call."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


@contextmanager
def hooked(handles: Sequence[Any]) -> Iterator[None]:
    """Remove the hooks at the end, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
