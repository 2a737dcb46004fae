"""The inputs of modules, recorded while other code runs them."""

from __future__ import annotations

import pytest
import torch
from architectures.factory import architectures, build
from architectures.listening import listening
from torch import nn


def test_inputs_of_a_module_are_recorded() -> None:
    layer, states = nn.Linear(3, 2), torch.randn(4, 3)
    call = nn.Module.__call__
    with listening() as recorded, torch.no_grad():
        layer(states)
    assert nn.Module.__call__ is call
    assert recorded.distance(states) == 0
    assert recorded.distance(2 * states) == pytest.approx(0.5)
    assert recorded.distance(torch.randn(5, 3)) == float("inf")


def test_inputs_inside_a_whole_model_count_only_without_others() -> None:
    model = build(next(architecture for architecture in architectures() if architecture.name == "LlamaForCausalLM"))
    tokens = torch.randint(64, 320, (2, 7), generator=torch.Generator().manual_seed(0))
    states: list[torch.Tensor] = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: states.append(args[0]))
    with listening() as recorded, torch.no_grad():
        model(input_ids=tokens, use_cache=False)
        model(input_ids=tokens, use_cache=False)
    assert [batch.tolist() for batch in recorded.batches] == [tokens.tolist()]
    assert recorded.distance(states[0]) == 0
    with listening() as recorded, torch.no_grad():
        model(input_ids=tokens, use_cache=False)
        nn.Identity()(torch.zeros_like(states[0]))
    assert recorded.distance(states[0]) == pytest.approx(1)
