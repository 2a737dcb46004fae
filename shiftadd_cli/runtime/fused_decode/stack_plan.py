"""All blocks of a decoder in the form that the CPU kernels take in one call; see native/stack.h."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from shiftadd_cli.native.extension import cpu_extension
from shiftadd_cli.runtime.fused_decode.block_plan import BlockPlan
from shiftadd_cli.runtime.fused_decode.module_watch import Watch
from shiftadd_cli.runtime.kv_cache import Rooms


class StackPlan:
    """The data that the kernels need for consecutive blocks, valid as long as `watch` holds.

    first: the first block; plans: of all blocks; form: of all blocks, except for fields that may differ, see `alike`.
    """

    def __init__(self, first: nn.Module, plans: Sequence[BlockPlan], watch: Watch) -> None:
        """plans: of the blocks, which are `alike`; watch: checked in addition to theirs."""
        self.first = first
        self.form, self._precision = plans[0].form, plans[0].precision
        self.watch = Watch.over([watch, *(plan.watch for plan in plans)])
        self.plans = tuple(plans)
        self._stack = cpu_extension().DecoderStack([plan.native for plan in plans])

    def decode(self, hidden: Tensor, cosines: Tensor, sines: Tensor, rooms: Rooms) -> Tensor:
        """The output of the last block for new tokens, like `hidden`; appends their keys and values to `rooms`.

        hidden, cosines, sines: as for `BlockPlan.heads`. rooms: one layer per block, with room for the tokens.
        """
        output = torch.empty_like(hidden)
        fast = self._precision.is_fast(hidden.dtype)
        self._stack.decode(hidden, cosines, sines, rooms.native, rooms.tokens, output, fast, torch.get_num_threads())
        rooms.tokens += hidden.shape[1]
        return output


def alike(plans: Sequence[BlockPlan]) -> bool:
    """Whether the kernels can compute these blocks in one call: equal heads and one precision."""
    return len({(plan.form.heads, plan.form.key_heads, plan.form.head_size, plan.precision) for plan in plans}) == 1
