"""Second moments of the inputs of a block's linears, H = E[x xᵀ], gathered while the block runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shiftadd_cli.calibration.streams import HiddenStates
from shiftadd_cli.calibration.trace import BlockCall

# Columns of a second moment that are added to at once.
_STRIP = 256


@dataclass(frozen=True)
class SharedInput:
    """Linears that read the same tensor and its second moment, float32 `[in, in]`; None if it was never read."""

    names: tuple[str, ...]
    hessian: Tensor | None


class _Moment:
    def __init__(self, width: int, device: torch.device) -> None:
        self.total = torch.zeros(width, width, device=device)
        self.rows = 0

    def add(self, inputs: Tensor) -> None:
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        # The matrix is symmetric: strips from the diagonal rightwards are little more than half the work.
        for start in range(0, rows.shape[1], _STRIP):
            self.total[start : start + _STRIP, start:].addmm_(rows[:, start : start + _STRIP].T, rows[:, start:])
        self.rows += len(rows)

    def mean(self) -> Tensor:
        """The second moment, whole."""
        upper = self.total.triu()
        return (upper + upper.triu(1).T) / self.rows


def gather_moments(
    block: nn.Module,
    linears: Sequence[tuple[str, nn.Module]],
    hidden: HiddenStates,
    calls: Mapping[int, Sequence[BlockCall]],
    depth: int,
    device: torch.device,
) -> list[SharedInput]:
    """Run all batches through `block` and gather the second moment of every distinct input of `linears`.

    The first batch shows which linears read the same tensor (query, key and value; gate and up); each such tensor is
    gathered once. Order follows `linears`.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str, inputs: Tensor) -> None:
        seen[name] = inputs

    moments: dict[str, _Moment] = {}
    groups: list[list[str]] = []
    for index, batch in enumerate(hidden):
        watched = linears if index == 0 else [(name, module) for name, module in linears if name in moments]
        handles = [
            module.register_forward_pre_hook(lambda _, args, name=name: keep(name, args[0])) for name, module in watched
        ]
        with torch.no_grad():
            calls[len(batch)][depth].run(block, batch.to(device))
        for handle in handles:
            handle.remove()
        if index == 0:
            groups = _group_by_input(seen, [name for name, _ in linears])
            moments = {group[0]: _Moment(seen[group[0]].shape[-1], device) for group in groups}
        for name, moment in moments.items():
            moment.add(seen[name])
        seen.clear()
    shared = [SharedInput(tuple(group), moments[group[0]].mean()) for group in groups]
    reached = {name for group in groups for name in group}
    return shared + [SharedInput((name,), None) for name, _ in linears if name not in reached]


def _group_by_input(seen: dict[str, Tensor], order: Sequence[str]) -> list[list[str]]:
    """Names whose inputs are one tensor in memory; all inputs are alive, so equal places mean equal tensors."""
    groups: dict[tuple[int, torch.Size, tuple[int, ...]], list[str]] = {}
    for name in order:
        if name in seen:
            inputs = seen[name]
            groups.setdefault((inputs.data_ptr(), inputs.shape, inputs.stride()), []).append(name)
    return list(groups.values())
