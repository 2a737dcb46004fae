"""Which linear layers have their weight read by other code than their own forward, found by running.

Mamba multiplies by `dt_proj.weight` itself instead of calling `dt_proj`. Such a layer reads no input that could be
calibrated on, and a packed layer in its place has no matrix to be read; so it stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Questions that do not look at the values of a weight; attributes such as dtype are asked by `__get__`.
_QUESTIONS = {"__get__", "size", "dim", "numel", "stride", "is_floating_point", "element_size", "__len__"}
_TOKENS = 8


class _WatchedWeight(Tensor):
    """A weight that calls `on_use` when it is computed with."""

    on_use: Callable[[], None]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ not in _QUESTIONS:
            for value in (*args, *(kwargs or {}).values()):
                if isinstance(value, _WatchedWeight):
                    value.on_use()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


@contextmanager
def watching_weights(modules: Mapping[str, nn.Module]) -> Iterator[set[str]]:
    """While this lasts, the names of those of `modules` whose weight other code computes with are added to the set."""
    used: set[str] = set()
    classes = {name: type(module) for name, module in modules.items()}
    for name, module in modules.items():
        module.__class__ = _watched(type(module), name, used)
    try:
        yield used
    finally:
        for name, module in modules.items():
            module.__class__ = classes[name]
            module.__dict__.pop("_in_own_forward", None)


def _watched(own: type[nn.Module], name: str, used: set[str]) -> type[nn.Module]:
    class Watched(own):  # type: ignore[misc, valid-type]
        def __getattr__(self, attribute: str) -> Any:
            value = super().__getattr__(attribute)
            if attribute != "weight" or self.__dict__.get("_in_own_forward"):
                return value
            watched = value.detach().as_subclass(_WatchedWeight)
            watched.on_use = lambda: used.add(name)
            return watched

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.__dict__["_in_own_forward"] = True
            try:
                return super().forward(*args, **kwargs)
            finally:
                self.__dict__["_in_own_forward"] = False

    Watched.__name__ = own.__name__
    return Watched


def weights_read_by_others(model: Any, modules: Mapping[str, nn.Module]) -> set[str]:
    """Names of those of `modules`, parts of a decoder on the meta device, whose weight other code computes with.

    The model runs on a few tokens without values. A model that cannot run without values gives an empty set; the run
    itself watches again (see `calibration.trace`), and refuses such layers by name.
    """
    if getattr(model, "main_input_name", None) != "input_ids":
        return set()
    with watching_weights(modules) as used, torch.no_grad():
        try:
            model(input_ids=torch.zeros(1, _TOKENS, dtype=torch.long, device="meta"), use_cache=False)
        except Exception:  # code that depends on values fails in any way without them
            return set()
    return used
