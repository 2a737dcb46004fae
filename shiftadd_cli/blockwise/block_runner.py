"""One version of a block (as it was, or as it is being quantized) and the hidden states that reach it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shiftadd_cli.blockwise.calls import BlockCall
from shiftadd_cli.blockwise.forward import StopForward, check_finite, hooked
from shiftadd_cli.blockwise.hidden_states import HiddenStates
from shiftadd_cli.blockwise.output_cache import OutputCache
from shiftadd_cli.distributed.team import ALONE, Team
from shiftadd_cli.source.experts import SplitExperts


@dataclass(frozen=True)
class BlockStream:
    """`block` is fed `hidden`, batch by batch, in the call of each batch. With a `playback` of the block, what is
    finished in it need not be computed again."""

    block: nn.Module
    hidden: HiddenStates
    calls: Mapping[int, BlockCall]
    device: torch.device
    playback: OutputCache | None = None

    def inputs(self, index: int, names: Sequence[str]) -> dict[str, Tensor]:
        """What the modules `names` (paths in the block) read when batch `index` runs through, in the order they run.

        Of split experts that is the numbers of the experts that each token is sent to. A module that does not run is
        not in the result. The forward is left as soon as all have been seen.
        """
        seen: dict[str, Tensor] = {}

        def leave() -> None:
            if len(seen) == len(names):
                raise StopForward

        with self._noting(names, seen, leave), suppress(StopForward):
            self._run(index)
        return seen

    def run_seeing(self, index: int, names: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
        """The same, and what the block gives out."""
        seen: dict[str, Tensor] = {}
        with self._noting(names, seen, lambda: None):
            return seen, self._run(index)

    def _noting(
        self, names: Sequence[str], seen: dict[str, Tensor], then: Callable[[], None]
    ) -> AbstractContextManager[None]:
        """Put what the modules read into `seen`, each time followed by `then`."""

        def note(name: str, module: Any, args: tuple[Any, ...]) -> None:
            seen[name] = module.routing(*args) if isinstance(module, SplitExperts) else args[0]
            then()

        handles = []
        for name in names:
            module = self.block.get_submodule(name)
            handles.append(module.register_forward_pre_hook(lambda part, args, name=name: note(name, part, args)))
        return hooked(handles)

    def span(self, index: int) -> slice:
        """The samples of a batch."""
        return self.hidden.span(index)

    def shared_inputs(self, names: Sequence[str], team: Team = ALONE) -> list[tuple[str, ...]]:
        """The linears `names` by the tensor they read (query, key and value; gate and up), in the order they run.

        The first batch shows it, to the first process of a team. Linears that it does not reach are left out.
        """
        found = team.share(self._shared_inputs(names) if team.first else [])
        return [tuple(group) for group in found]

    def _shared_inputs(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        groups: dict[tuple[int, torch.Size, tuple[int, ...]], list[str]] = {}
        # All inputs are alive, so equal places in memory mean equal tensors.
        seen, _ = self.run_seeing(0, names)
        for name, inputs in seen.items():
            groups.setdefault((inputs.data_ptr(), inputs.shape, inputs.stride()), []).append(name)
        return [tuple(name for name in names if name in group) for group in groups.values()]

    def advance(
        self,
        name: str,
        team: Team = ALONE,
        modules: Sequence[str] = (),
        note: Callable[[int, dict[str, Tensor]], None] = lambda index, seen: None,
    ) -> None:
        """Put the block's outputs in the place of its inputs; `name` is what errors call the block.

        note: told of every batch what these modules read. Each process of a team runs batches of its own, and the first
        is told of all outputs.
        """
        for index in team.shards(len(self.hidden)).own():
            seen, output = self.run_seeing(index, modules)
            check_finite(output, name)
            note(index, seen)
            self.hidden.replace(index, output)
        self.hidden.collect(team)

    @torch.no_grad()
    def _run(self, index: int) -> Tensor:
        batch = self.hidden[index]
        with nullcontext() if self.playback is None else self.playback.during(index):
            return self.calls[index].run(self.block, batch.to(self.device))
