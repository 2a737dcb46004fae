"""Decoders that make a new token in one call of the CPU kernels, blocks and cache together.

What a block costs beside its computation (calls of modules, checks, two calls of the kernels, a cache of transformers)
is some fifty microseconds, as much as a block of a small model computes. While the forward of a model runs that calls
its blocks one after the other, the first block computes all of them, and the others hand its output on.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from shiftadd_cli.runtime.kernels.block_plan import BlockPlan
from shiftadd_cli.runtime.kernels.stack_plan import StackPlan, alike
from shiftadd_cli.runtime.kernels.watch import Watch
from shiftadd_cli.runtime.made_class import Reduced, reduce_made
from shiftadd_cli.runtime.stack_cache import open_rooms

# Where a block keeps its `BlockPlan`, and a model its `StackPlan`.
PLAN, STACK = "_plan", "_stack_plan"
_TRAINING = attrgetter("training")


class LookupModel(nn.Module):
    """Put before a class of `MODELS` in the order of resolution; see `model_class`."""

    dense_class: ClassVar[type[nn.Module]]
    layers: Any
    config: Any

    def find_stack(self) -> StackPlan | None:
        """How the kernels compute all blocks, or None if they do not, or cannot tell yet: each block must have been
        computed by them before."""
        stack: StackPlan | None = self.__dict__.get(STACK)
        if stack is None or not stack.watch.holds():
            stack = self.__dict__[STACK] = self._make_stack()
        if stack is None or stack.watch.is_heard() or any(map(_TRAINING, self.layers)):
            return None
        return stack if self.config.num_hidden_layers == len(self.layers) else None

    def _make_stack(self) -> StackPlan | None:
        blocks = tuple(self.layers)
        plans = [plan for block in blocks if isinstance(plan := block.__dict__.get(PLAN), BlockPlan)]
        if not blocks or len(plans) < len(blocks) or not alike(plans) or not all(each.watch.holds() for each in plans):
            return None
        # Else they may get other masks than the first.
        kinds = set(getattr(self.config, "layer_types", None) or ())
        if kinds - {"full_attention"} or getattr(self.config, "sliding_window", None) is not None:
            return None
        if [block.self_attn.layer_idx for block in blocks] != list(range(len(blocks))):
            return None
        held = self.layers._modules
        places = [(self._modules, "layers"), *((held, name) for name in held)]
        return StackPlan(plans, Watch(places, (), blocks))

    def __getstate__(self) -> dict[str, Any]:
        # Addresses are of this process.
        return {name: value for name, value in self.__dict__.items() if name != STACK}

    def __reduce_ex__(self, _: Any) -> Reduced:
        return reduce_made(model_class, self)


class _Pass:
    """One forward of a model, which calls its blocks one after the other."""

    def __init__(self, model: LookupModel) -> None:
        self._model = model
        self._output: Tensor | None = None
        self._passed = 0

    def hands_on(self, block: nn.Module, hidden: Tensor) -> bool:
        """Whether `hidden`, which the block is called with, is already the output of all blocks.

        Raises RuntimeError where it should be, and is not: the model was changed while it ran.
        """
        if self._output is None:
            return False
        self._passed += 1
        layers = self._model.layers
        if hidden is not self._output or self._passed >= len(layers) or block is not layers[self._passed]:
            raise RuntimeError(f"{type(self._model).__name__} does not call its blocks one after the other.")
        return True

    def decode(self, block: nn.Module, hidden: Tensor, cosines: Tensor, sines: Tensor, cache: Any) -> Tensor | None:
        """The output of all blocks for a new token that needs no mask, or None where each is to compute its own.

        hidden: `[rows, 1, in]`, contiguous as the others; cache: of keys and values, or None.
        """
        layers = self._model.layers
        if cache is None or block is not layers[0] or (stack := self._model.find_stack()) is None:
            return None
        form = stack.form
        if not form.takes(hidden, cosines, sines):
            return None
        rooms = open_rooms(cache, len(layers), (hidden.shape[0], form.key_heads, form.head_size), hidden.dtype)
        if rooms is not None:
            self._output = stack.decode(hidden, cosines, sines, rooms)
        return self._output


_here = threading.local()


def current_pass() -> _Pass | None:
    """The forward that this thread is in, of a model made by `model_class`."""
    found: _Pass | None = getattr(_here, "found", None)
    return found


@contextmanager
def _one_pass(model: LookupModel) -> Iterator[None]:
    outer = current_pass()
    _here.found = _Pass(model)
    try:
        yield
    finally:
        _here.found = outer


_CLASSES: dict[type[nn.Module], type[LookupModel]] = {}


def model_class(dense: type[nn.Module]) -> type[LookupModel]:
    """The class of models that do what those of `dense`, one of `MODELS`, do, and let the first block compute all."""
    if dense not in _CLASSES:

        @functools.wraps(dense.forward)
        def forward(self: LookupModel, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return dense.forward(self, *args, **kwargs)
            with _one_pass(self):
                return dense.forward(self, *args, **kwargs)

        # transformers knows what a class can record by the name and the module of the class.
        names = {"dense_class": dense, "forward": forward, "__module__": dense.__module__}
        _CLASSES[dense] = type(dense.__name__, (LookupModel, dense), names)
    return _CLASSES[dense]
