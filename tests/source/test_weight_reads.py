"""Detection of weights that code besides a layer's own forward computes with. Queries do not count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, MIXTURES, UNUSUAL, save_tiny
from torch import Tensor, nn

from shiftadd_cli.source import open_source
from shiftadd_cli.source.weight_reads import watching_weights, weights_read_by_others


class Pair(nn.Module):
    """Two linears, and another use of the weight of the first."""

    def __init__(self, other: Callable[[nn.Linear, Tensor], object]) -> None:
        super().__init__()
        self.first, self.second, self.other = nn.Linear(4, 4), nn.Linear(4, 4), other

    def forward(self, x: Tensor) -> Tensor:
        self.other(self.first, x)
        return self.second(self.first(x))


USES: dict[str, Callable[[nn.Linear, Tensor], object]] = {
    "product": lambda linear, x: x @ linear.weight,
    "transposed": lambda linear, x: x @ linear.weight.T,
    "function": lambda linear, x: nn.functional.linear(x, linear.weight),
    "data": lambda linear, x: linear.weight.data + 1,
    "element": lambda linear, x: linear.weight[0],
    "in place": lambda linear, x: linear.weight.mul_(1),
}
QUESTIONS: dict[str, Callable[[nn.Linear, Tensor], object]] = {
    "dtype": lambda linear, x: x.to(linear.weight.dtype),
    "device": lambda linear, x: x.to(linear.weight.device),
    "shape": lambda linear, x: linear.weight.shape[0] + linear.weight.size(1) + linear.weight.ndim,
    "bias": lambda linear, x: x + linear.bias,
    "nothing": lambda linear, x: None,
}


def watched(pair: Pair) -> set[str]:
    with torch.no_grad(), watching_weights(pair, {"a": pair.first, "b": pair.second}) as used:
        pair(torch.zeros(2, 4))
    return used


@pytest.mark.parametrize("use", USES)
def test_weight_used_in_a_computation_is_detected(use: str) -> None:
    assert watched(Pair(USES[use])) == {"a"}


@pytest.mark.parametrize("question", QUESTIONS)
def test_query_about_a_weight_is_not_a_use(question: str) -> None:
    assert watched(Pair(QUESTIONS[question])) == set()


def test_layers_that_share_a_weight_use_it_themselves() -> None:
    pair = Pair(QUESTIONS["nothing"])
    pair.second.weight = pair.first.weight
    with torch.no_grad(), watching_weights(pair, {"a": pair.first}) as used:
        pair(torch.zeros(2, 4))
    assert used == set()


def test_no_hooks_are_left_behind() -> None:
    pair = Pair(USES["product"])
    watched(pair)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pair.modules())


READ = {"mamba": {"mixer.dt_proj"}, "jamba": {"mamba.dt_proj"}}


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES, *UNUSUAL])
def test_models_run_without_values_and_show_which_weights_they_read(tmp_path: Path, family: str) -> None:
    model = open_source(str(save_tiny(family, tmp_path))).skeleton()
    linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    used = weights_read_by_others(model, tuple(name for name in linears if "head" not in name))
    assert {".".join(name.split(".")[-2:]) for name in used} == READ.get(family, set())
    assert all(parameter.is_meta for parameter in model.parameters())
