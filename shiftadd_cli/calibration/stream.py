"""One version of a block (as it was, or as it is being quantized) and the hidden states that reach it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shiftadd_cli.calibration.streams import HiddenStates
from shiftadd_cli.calibration.trace import BlockCall, StopForward, check_finite, hooked


@dataclass(frozen=True)
class BlockStream:
    """`block` is fed `hidden`, batch by batch; `calls[batch size]` are its other arguments."""

    block: nn.Module
    hidden: HiddenStates
    calls: Mapping[int, BlockCall]
    device: torch.device

    def inputs(self, index: int, names: Sequence[str], *, early: bool = True) -> dict[str, Tensor]:
        """What the modules `names` (paths in the block) read when batch `index` runs through, in the order they run.

        A module that does not run is not in the result. `early`: leave the forward as soon as all have been seen.
        """
        seen: dict[str, Tensor] = {}

        def keep(name: str, inputs: Tensor) -> None:
            seen[name] = inputs
            if early and len(seen) == len(names):
                raise StopForward

        handles = [
            self.block.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: keep(name, args[0]))
            for name in names
        ]
        with hooked(handles), suppress(StopForward):
            self._run(self.hidden[index])
        return seen

    def shared_inputs(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        """The linears `names` by the tensor they read (query, key and value; gate and up), in the order they run.

        The first batch shows it. Linears that it does not reach are left out.
        """
        groups: dict[tuple[int, torch.Size, tuple[int, ...]], list[str]] = {}
        # All inputs are alive, so equal places in memory mean equal tensors.
        seen = self.inputs(0, names, early=False)
        for name, inputs in seen.items():
            groups.setdefault((inputs.data_ptr(), inputs.shape, inputs.stride()), []).append(name)
        return [tuple(name for name in names if name in group) for group in groups.values()]

    def advance(self, name: str) -> None:
        """Put the block's outputs in the place of its inputs; `name` is what errors call the block."""
        for index, batch in enumerate(self.hidden):
            output = self._run(batch)
            check_finite(output, name)
            self.hidden.replace(index, output)

    @torch.no_grad()
    def _run(self, batch: Tensor) -> Tensor:
        return self.calls[len(batch)].run(self.block, batch.to(self.device))
