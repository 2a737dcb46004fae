"""One version of a block (the original or the one being quantized) and the hidden states that reach it."""

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
from shiftadd_cli.context import ALONE_ON_CPU, Context
from shiftadd_cli.source.experts import SplitExperts

# In place of the path of a module: the one that reads the output of the block.
OUTPUT = ""


@dataclass(frozen=True)
class BlockStream:
    """Feeds `hidden` to `block`, batch by batch, with the recorded call of each batch. Errors call the block `name`.
    With a `playback` of the block, its finished parts are not computed again."""

    name: str
    block: nn.Module
    hidden: HiddenStates
    calls: Mapping[int, BlockCall]
    context: Context = ALONE_ON_CPU
    playback: OutputCache | None = None

    @property
    def device(self) -> torch.device:
        return self.context.device

    def inputs(self, index: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Inputs of the modules `names` (paths in the block) in batch `index`, in the order they run.

        The name `OUTPUT` stands for the reader of the block's output. The input of split experts is the numbers of the
        experts that each token is sent to. Modules that do not run are left out. The forward stops as soon as all
        inputs have been seen.
        """
        if OUTPUT in names:
            seen, output = self.run_seeing(index, [name for name in names if name != OUTPUT])
            return seen | {OUTPUT: output}
        seen = {}

        def leave() -> None:
            if len(seen) == len(names):
                raise StopForward

        with self._noting(names, seen, leave), suppress(StopForward):
            self._run(index)
        return seen

    def run_seeing(self, index: int, names: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
        """The same inputs, and the output of the block."""
        seen: dict[str, Tensor] = {}
        with self._noting(names, seen, lambda: None):
            return seen, self._run(index)

    def _noting(
        self, names: Sequence[str], seen: dict[str, Tensor], then: Callable[[], None]
    ) -> AbstractContextManager[None]:
        """Put the inputs of the modules into `seen`, and call `then` after each."""

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

    def shared_inputs(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        """The linears `names` in the order they run, grouped by shared input (query, key and value; gate and up).

        The first process of a team finds the groups from the first batch. Linears that it does not reach are left out.
        """
        team = self.context.team
        groups = team.share(self._shared_inputs(names) if team.first else [])
        return [tuple(group) for group in groups]

    def _shared_inputs(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        groups: dict[tuple[int, torch.Size, tuple[int, ...]], list[str]] = {}
        # All inputs are alive, so equal addresses mean equal tensors.
        seen, _ = self.run_seeing(0, names)
        for name, inputs in seen.items():
            groups.setdefault((inputs.data_ptr(), inputs.shape, inputs.stride()), []).append(name)
        return [tuple(name for name in names if name in group) for group in groups.values()]

    def advance(
        self,
        modules: Sequence[str] = (),
        note: Callable[[int, dict[str, Tensor]], None] = lambda index, seen: None,
    ) -> None:
        """Replace the block's inputs by its outputs.

        note: called with the number of every batch and the inputs of `modules`. Each process of a team runs its own
        batches, and the first receives all outputs.
        """
        for index in self.context.team.shards(len(self.hidden)).own():
            seen, output = self.run_seeing(index, modules)
            check_finite(output, self.name)
            note(index, seen)
            self.hidden.replace(index, output)
        self.hidden.collect(self.context.team)

    @torch.no_grad()
    def _run(self, index: int) -> Tensor:
        batch = self.hidden[index]
        with nullcontext() if self.playback is None else self.playback.during(index):
            return self.calls[index].run(self.block, batch.to(self.device))
