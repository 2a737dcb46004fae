"""Which linear layers have their weight read by other code than their own forward, found by running.

Mamba multiplies by `dt_proj.weight` itself instead of calling `dt_proj`. Such a layer reads no input that could be
calibrated on, and a packed layer in its place has no matrix to be read; so it stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

# Questions that do not look at the values of a weight: methods, and attributes.
_METHODS = {"size", "dim", "numel", "stride", "is_floating_point", "is_contiguous", "element_size", "__len__"}
_ATTRIBUTES = {"dtype", "device", "shape", "ndim", "is_meta", "is_cuda", "requires_grad", "layout", "nbytes"}
_TOKENS = 8


class _Watch(TorchFunctionMode):
    """Notes weights that are computed with while the layer that they belong to does not run itself."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.owners = {id(module.get_parameter("weight")): name for name, module in modules.items()}
        self.used: set[str] = set()
        self.running: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        attribute = getattr(getattr(func, "__self__", None), "__name__", None)
        if func.__name__ not in _METHODS and not (func.__name__ == "__get__" and attribute in _ATTRIBUTES):
            for value in (*args, *(kwargs or {}).values()):
                name = self.owners.get(id(value))
                if name is not None and name not in self.running:
                    self.used.add(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def watching_weights(root: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[set[str]]:
    """While this lasts, the names of those of `modules` whose weight other code computes with are added to the set.

    root: what they are part of; others in it may share their weights.
    """
    watch = _Watch(modules)
    with ExitStack() as stack:
        for module in root.modules():
            name = watch.owners.get(id(module._parameters.get("weight")))
            if name is None:
                continue
            enter = module.register_forward_pre_hook(lambda *_, name=name: watch.running.append(name))
            leave = module.register_forward_hook(lambda *_, name=name: watch.running.remove(name))
            stack.callback(enter.remove)
            stack.callback(leave.remove)
        with watch:
            yield watch.used


# A structure is found anew for every plan.
@lru_cache(maxsize=1)
def weights_read_by_others(model: Any, names: tuple[str, ...]) -> frozenset[str]:
    """Those of the linears `names` of a decoder on the meta device whose weight other code computes with.

    The model runs on a few tokens without values. A model that cannot run without values gives an empty set; the run
    itself watches again (see `blockwise.trace`), and refuses such layers by name.
    """
    if getattr(model, "main_input_name", None) != "input_ids":
        return frozenset()
    with watching_weights(model, {name: model.get_submodule(name) for name in names}) as used, without_values():
        try:
            model(input_ids=torch.zeros(1, _TOKENS, dtype=torch.long, device="meta"), use_cache=False)
        except Exception:  # code that depends on values fails in any way without them
            return frozenset()
    return frozenset(used)


@contextmanager
def without_values() -> Iterator[None]:
    """While this lasts, models on the meta device run, and skip checks of values as where they are compiled."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        yield
