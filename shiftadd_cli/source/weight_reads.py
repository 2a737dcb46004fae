"""Finds, by running the model, linear layers whose weight is read by code outside their own forward.

Mamba multiplies by `dt_proj.weight` itself instead of calling `dt_proj`. Such a layer has no input for calibration, and
a packed layer has no matrix to read, so it stays uncompressed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

# Methods and attributes that do not read the values of a weight.
_METHODS = {"size", "dim", "numel", "stride", "is_floating_point", "is_contiguous", "element_size", "__len__"}
_ATTRIBUTES = {"dtype", "device", "shape", "ndim", "is_meta", "is_cuda", "requires_grad", "layout", "nbytes"}
_TOKENS = 8
# Weights read by other code, by the class of a model, its configuration and the linears in question.
_answers: dict[tuple[type, str, tuple[str, ...]], frozenset[str]] = {}


class _Watch(TorchFunctionMode):
    """Records weights that are used in a computation while their own layer is not running."""

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
    """Collect the names of those `modules` whose weight other code computes with, for the duration of the context.

    root: the module that contains them; other modules in it may share their weights.
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


def weights_read_by_others(model: Any, names: tuple[str, ...]) -> frozenset[str]:
    """Those linears among `names` whose weight other code computes with, in a decoder on the meta device.

    The model runs on a few tokens without values. If it cannot run without values, the set is empty; the real run
    checks again (see `blockwise.trace`) and refuses such layers by name.
    """
    if getattr(model, "main_input_name", None) != "input_ids":
        return frozenset()
    # Every plan and every copy of a model asks again, and the answer depends on its code and configuration alone.
    key = (type(model), model.config.to_json_string(use_diff=False), names)
    if key not in _answers:
        _answers[key] = _read_without_values(model, names)
    return _answers[key]


def _read_without_values(model: Any, names: tuple[str, ...]) -> frozenset[str]:
    with watching_weights(model, {name: model.get_submodule(name) for name in names}) as used, without_values():
        try:
            model(input_ids=torch.zeros(1, _TOKENS, dtype=torch.long, device="meta"), use_cache=False)
        except Exception:  # code that depends on values may fail in any way without them
            return frozenset()
    return frozenset(used)


@contextmanager
def without_values() -> Iterator[None]:
    """Let models on the meta device run; they skip checks of values, as they do when compiled."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        yield
