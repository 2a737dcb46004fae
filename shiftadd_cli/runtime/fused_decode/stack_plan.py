"""All blocks of a decoder as the CPU kernels take them in one call; see native/stack.h."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from shiftadd_cli.native.extension import TYPES, cpu_extension
from shiftadd_cli.runtime.fused_decode.block_plan import BlockPlan
from shiftadd_cli.runtime.fused_decode.module_watch import Watch
from shiftadd_cli.runtime.kv_cache import Rooms


class StackPlan:
    """What the kernels need of blocks that follow one another, as long as `watch` holds.

    first: the first block; plans: of all; form: theirs, but for what may differ between them, see `alike`.
    """

    def __init__(self, first: nn.Module, plans: Sequence[BlockPlan], watch: Watch) -> None:
        """plans: of the blocks, which are `alike`; watch: what must stay beside what they watch."""
        self.first = first
        self.form, self._precision = plans[0].form, plans[0].precision
        self.watch = Watch.over([watch, *(each.watch for each in plans)])
        # They hold what the addresses are of.
        self.plans = tuple(plans)
        self._stack = cpu_extension().DecoderStack([each.native for each in plans])

    def decode(self, hidden: Tensor, cosines: Tensor, sines: Tensor, rooms: Rooms) -> Tensor:
        """The output of the last block for one new token of each sequence, its keys and values put behind those held.

        hidden, cosines, sines: as for `BlockPlan.heads`. rooms: of as many layers as there are blocks, with room for
        the token. Returns `[rows, 1, in]`.
        """
        output = torch.empty_like(hidden)
        self._stack.decode(
            hidden.data_ptr(),
            TYPES[hidden.dtype],
            hidden.shape[0],
            cosines.data_ptr(),
            sines.data_ptr(),
            TYPES[cosines.dtype],
            self.form.head_size if cosines.shape[0] > 1 else 0,
            rooms.keys,
            rooms.values,
            rooms.capacities,
            rooms.tokens,
            output.data_ptr(),
            self._precision.is_fast(hidden.dtype),
            torch.get_num_threads(),
        )
        rooms.tokens += 1
        return output


def alike(plans: Sequence[BlockPlan]) -> bool:
    """Whether the kernels can compute these blocks in one call: equal heads, and one precision."""
    return len({(each.form.heads, each.form.key_heads, each.form.head_size, each.precision) for each in plans}) == 1
