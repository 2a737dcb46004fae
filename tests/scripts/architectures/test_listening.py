"""What is heard of modules while others run them."""

from __future__ import annotations

import pytest
import torch
from architectures.factory import architectures, build
from architectures.listening import listening
from torch import nn


def test_what_a_module_is_given_is_heard() -> None:
    layer, states = nn.Linear(3, 2), torch.randn(4, 3)
    call = nn.Module.__call__
    with listening() as heard, torch.no_grad():
        layer(states)
    assert nn.Module.__call__ is call
    assert heard.distance(states) == 0
    assert heard.distance(2 * states) == pytest.approx(0.5)
    assert heard.distance(torch.randn(5, 3)) == float("inf")


def test_a_whole_model_counts_only_where_nothing_else_was_seen() -> None:
    model = build(next(architecture for architecture in architectures() if architecture.name == "LlamaForCausalLM"))
    tokens = torch.randint(64, 320, (2, 7), generator=torch.Generator().manual_seed(0))
    states: list[torch.Tensor] = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: states.append(args[0]))
    with listening() as heard, torch.no_grad():
        model(input_ids=tokens, use_cache=False)
        model(input_ids=tokens, use_cache=False)
    assert [batch.tolist() for batch in heard.batches] == [tokens.tolist()]
    assert heard.distance(states[0]) == 0
    with listening() as heard, torch.no_grad():
        model(input_ids=tokens, use_cache=False)
        nn.Identity()(torch.zeros_like(states[0]))
    assert heard.distance(states[0]) == pytest.approx(1)
