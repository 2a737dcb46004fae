"""Where the output of a linear joins the hidden states of its block.

A block adds the outputs of some of its linears (the last of attention, the last of an MLP) to the hidden states that
run through it. The sum is read by a later module, or it is the output of the block. No architecture is assumed: the
output of a linear is changed, and its *junction* is the last reader whose input changes by exactly as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shiftadd_cli.blockwise.block_runner import OUTPUT, BlockStream
from shiftadd_cli.blockwise.forward import hooked
from shiftadd_cli.source.linear import linear_sizes

# Largest relative distance between vectors that count as equal, and the share of tokens for which they must. Sums in
# bfloat16 are rounded by .002 to .004 of their size.
_TOLERANCE, _SHARE = 0.03, 0.9


def find_junctions(stream: BlockStream, linears: Sequence[str]) -> dict[str, str]:
    """The junctions of `linears` (paths in the block), without those that have none: the path of a module whose first
    argument is the sum, or `OUTPUT`. The first process of a team finds them, on the first batch."""
    team = stream.context.team
    return team.share(_junctions(stream, linears) if team.first else {})


def _junctions(stream: BlockStream, linears: Sequence[str]) -> dict[str, str]:
    before = _states(stream)
    shape, size = before[OUTPUT].shape, before[OUTPUT].square().mean().sqrt().cpu()
    generator = torch.Generator().manual_seed(0)
    junctions: dict[str, str] = {}
    for linear in linears:
        module = stream.block.get_submodule(linear)
        # A linear of another width adds to something else.
        if (sizes := linear_sizes(module)) is None or sizes[0] != shape[-1]:
            continue
        outputs: list[tuple[Tensor, Tensor]] = []

        def change(_: Any, __: Any, output: Tensor, outputs: list[tuple[Tensor, Tensor]] = outputs) -> Tensor:
            # As large as the hidden states, so that the rounding of a sum is small beside it.
            changed = output + (torch.randn(output.shape, generator=generator) * size).to(output)
            outputs.append((output.float(), changed.float()))
            return changed

        with hooked([module.register_forward_hook(change)]):
            after = _states(stream)
        if len(outputs) != 1 or outputs[0][0].shape != shape:
            continue
        ((output, changed),) = outputs
        states = {name: state for name, state in before.items() if name in after and state.shape == shape}
        readers = [name for name, state in states.items() if _agree(after[name] - state, changed - output)]
        # Readers are in the order in which they run; the output of the block is the last. A norm may read the output
        # alone, and then only the norm's is added.
        if readers and not _agree(states[readers[-1]], output):
            junctions[linear] = readers[-1]
    return junctions


def _agree(state: Tensor, expected: Tensor) -> bool:
    distance = (state - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)
    return float((distance <= _TOLERANCE).float().mean()) >= _SHARE


def _states(stream: BlockStream) -> dict[str, Tensor]:
    """First arguments of all modules of the block in the first batch, float32, in the order in which they run, and its
    output."""
    states: dict[str, Tensor] = {}

    def note(name: str, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
            states[name] = args[0].float()

    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: note(name, args))
        for name, module in stream.block.named_modules()
        if name
    ]
    with hooked(handles):
        _, output = stream.run_seeing(0, [])
    states[OUTPUT] = output.float()
    return states
