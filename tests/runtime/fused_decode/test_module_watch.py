"""A watch notices changes to modules that are computed without being called."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import MappingProxyType

import pytest
import torch
from compiled import needs_kernels
from torch import nn

from shiftadd_cli.runtime.fused_decode.module_watch import Place, Watch

pytestmark = needs_kernels


def watched() -> tuple[nn.Sequential, Watch]:
    linear = nn.Linear(2, 3)
    model = nn.Sequential(linear, nn.Tanh())
    places: list[Place] = [
        (model._modules, "0"),
        (model._modules, "1"),
        (model._modules, "2"),
        (linear._parameters, "weight"),
    ]
    return model, Watch(places, [linear.weight], [linear, model[1]])


def _add(model: nn.Sequential) -> None:
    with torch.no_grad():
        model[0].get_parameter("weight").add_(1)


def _replace_data(model: nn.Sequential) -> None:
    weight = model[0].get_parameter("weight")
    weight.data = weight.data.clone()


def _new_parameter(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(model[0].get_parameter("weight").detach().clone())


def _new_module(model: nn.Sequential) -> None:
    model[1] = nn.Tanh()


def _one_more(model: nn.Sequential) -> None:
    model.append(nn.Tanh())


def _one_less(model: nn.Sequential) -> None:
    del model[1]


@pytest.mark.parametrize("change", [_add, _replace_data, _new_parameter, _new_module, _one_more, _one_less])
def test_changes_are_noticed(change: Callable[[nn.Sequential], None]) -> None:
    model, watch = watched()
    other = watched()[1]
    both = Watch.over([other, watch])
    assert watch.holds()
    assert both.holds()
    change(model)
    assert not watch.holds()
    assert not both.holds()
    assert other.holds()


def test_hooks_are_noticed_while_they_are_registered() -> None:
    model, watch = watched()
    both = Watch.over([watched()[1], watch])
    assert not watch.is_heard()
    for register in (model[0].register_forward_hook, model[1].register_forward_pre_hook):
        handle = register(lambda *_: None)
        assert watch.is_heard()
        assert both.is_heard()
        handle.remove()
        assert not both.is_heard()
    model[1].forward = model[0].forward
    assert watch.is_heard()
    # Hooks of the model itself do not matter, since only its parts are computed without a call.
    del model[1].forward
    model.register_forward_hook(lambda *_: None)
    assert not watch.is_heard()
    assert watch.holds()


def test_watch_does_not_keep_its_modules_alive() -> None:
    model, watch = watched()
    # A block stores its watch like this.
    model.__dict__["watch"] = watch
    reference = weakref.ref(model)
    del model, watch
    gc.collect()
    assert reference() is None


def test_only_dictionaries_are_accepted() -> None:
    with pytest.raises(TypeError, match="only dictionaries"):
        Watch([(MappingProxyType({}), "0")], (), ())  # type: ignore[list-item]
