"""Decoders that decode tokens in one call of the CPU kernels, blocks and cache together.

The overhead of a block (calls of modules, checks, two calls of the kernels, a transformers cache) is some fifty
microseconds, as much as the computation of a small model's block. The forward of a model calls its blocks one after the
other; the first block computes all of them where it can, and the others are skipped.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from shiftadd_cli.runtime.fused_decode.block_plan import BlockPlan
from shiftadd_cli.runtime.fused_decode.module_watch import Watch
from shiftadd_cli.runtime.fused_decode.stack_plan import StackPlan, alike
from shiftadd_cli.runtime.kv_cache import open_rooms
from shiftadd_cli.runtime.made_class import Reduced, reduce_made

# Attributes that hold the `BlockPlan` of a block and the `StackPlan` of a model.
PLAN, STACK = "_plan", "_stack_plan"
_TRAINING = attrgetter("training")


class LookupModel(nn.Module):
    """Precedes a class of `MODELS` in the MRO; see `model_class`."""

    dense_class: ClassVar[type[nn.Module]]
    config: Any

    @property
    def layers(self) -> Any:
        """The blocks; while a forward of this model runs in this thread, only those that it must call."""
        layers: Any = self._modules["layers"]
        if torch.compiler.is_compiling() or (forward_pass := current_pass()) is None or not forward_pass.is_of(self):
            return layers
        return forward_pass.blocks(layers)

    def find_stack(self) -> StackPlan | None:
        """The plan of all blocks. None if the kernels cannot compute them, or have not computed each of them before."""
        stack: StackPlan | None = self.__dict__.get(STACK)
        if stack is None or not stack.watch.holds():
            stack = self.__dict__[STACK] = self._make_stack()
        blocks: Any = self._modules["layers"]
        if stack is None or stack.watch.is_heard() or any(map(_TRAINING, blocks)):
            return None
        return stack if self.config.num_hidden_layers == len(blocks) else None

    def _make_stack(self) -> StackPlan | None:
        # Blocks of another kind may get another mask than the first.
        kinds = set(getattr(self.config, "layer_types", None) or ())
        if kinds - {"full_attention"} or getattr(self.config, "sliding_window", None) is not None:
            return None
        layers: Any = self._modules["layers"]
        blocks = tuple(layers)
        plans = [plan for block in blocks if isinstance(plan := block.__dict__.get(PLAN), BlockPlan)]
        if not blocks or len(plans) < len(blocks) or not alike(plans) or not all(plan.watch.holds() for plan in plans):
            return None
        if [block.self_attn.layer_idx for block in blocks] != list(range(len(blocks))):
            return None
        places = [(self._modules, "layers"), *((layers._modules, name) for name in layers._modules)]
        return StackPlan(blocks[0], plans, Watch(places, (), blocks))

    def __reduce_ex__(self, _: Any) -> Reduced:
        return reduce_made(model_class, self, without=STACK)


class _Pass:
    """One forward of a model."""

    def __init__(self, model: LookupModel) -> None:
        self._model = model
        self._stack: StackPlan | None = None
        self._done = False

    def is_of(self, model: LookupModel) -> bool:
        return model is self._model

    def blocks(self, layers: nn.ModuleList) -> Any:
        """The blocks that the model's forward must call: `layers`, or a replacement for it."""
        if self._stack is None:
            self._stack = self._model.find_stack()
        return layers if self._stack is None else _Blocks(layers, self)

    def calls(self, blocks: Sequence[nn.Module]) -> Iterator[nn.Module]:
        """The blocks, until nothing is left to compute."""
        for block in blocks:
            yield block
            if self._done:
                return

    def decode(self, block: nn.Module, hidden: Tensor, cosines: Tensor, sines: Tensor, cache: Any) -> Tensor | None:
        """The output of all blocks for new tokens that see all before them, or None if each must compute its own.

        hidden: `[sequences, tokens, in]`, contiguous like the others; cache: of keys and values, or None.
        """
        stack = self._stack
        if stack is None or cache is None or block is not stack.first or not stack.form.takes(hidden, cosines, sines):
            return None
        shape = (hidden.shape[0], stack.form.key_heads, stack.form.head_size)
        rooms = open_rooms(cache, len(stack.plans), shape, hidden.dtype, hidden.shape[1])
        if rooms is None:
            return None
        self._done = True
        return stack.decode(hidden, cosines, sines, rooms)


class _Blocks:
    """A list of blocks whose slices end once nothing is left to compute."""

    def __init__(self, layers: nn.ModuleList, forward_pass: _Pass) -> None:
        self._layers, self._forward_pass = layers, forward_pass

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return self._forward_pass.calls(tuple(self._layers)[key])
        return self._layers[key]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layers, name)


_here = threading.local()


def current_pass() -> _Pass | None:
    """The forward that this thread runs, of a model whose class `model_class` made; None if there is none."""
    running: _Pass | None = getattr(_here, "running", None)
    return running


@contextmanager
def _one_pass(model: LookupModel) -> Iterator[None]:
    outer = current_pass()
    _here.running = _Pass(model)
    try:
        yield
    finally:
        _here.running = outer


_CLASSES: dict[type[nn.Module], type[LookupModel]] = {}


def model_class(dense: type[nn.Module]) -> type[LookupModel]:
    """A class of models that behaves like `dense`, one of `MODELS`, and lets the first block compute all blocks."""
    if dense not in _CLASSES:

        @functools.wraps(dense.forward)
        def forward(self: LookupModel, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return dense.forward(self, *args, **kwargs)
            with _one_pass(self):
                return dense.forward(self, *args, **kwargs)

        # transformers looks up the outputs that a class can record by its name and module.
        names = {"dense_class": dense, "forward": forward, "__module__": dense.__module__}
        _CLASSES[dense] = type(dense.__name__, (LookupModel, dense), names)
    return _CLASSES[dense]
