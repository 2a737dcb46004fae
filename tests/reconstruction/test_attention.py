"""Fitting the feature map of a linear attention layer."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from shiftadd_cli.artifact.linear_attention import Heads
from shiftadd_cli.reconstruction.attention import FitSettings, fit_feature_map
from shiftadd_cli.runtime.linear_attention.attention import Reach
from shiftadd_cli.runtime.linear_attention.feature_maps import FeatureMap, make_map
from shiftadd_cli.runtime.linear_attention.module import Inputs, is_attention, recorded

REACH = Reach(window=4, sinks=1)
SIZE = 8
HEADS = Heads(queries=4, keys=2, size=SIZE)


def layer_inputs(texts: int = 10, tokens: int = 200) -> list[Inputs]:
    """Queries of few kinds, so that distant tokens matter and few features can express them."""
    generator = torch.Generator().manual_seed(0)
    kinds = 2 * torch.randn(HEADS.queries, 12, SIZE, generator=generator)

    def text() -> Inputs:
        chosen = torch.randint(12, (tokens,), generator=generator)
        query = kinds[:, chosen] + 0.1 * torch.randn(HEADS.queries, tokens, SIZE, generator=generator)
        key, value = torch.randn(2, HEADS.keys, tokens, SIZE, generator=generator)
        return Inputs(query[None], key[None], value[None], SIZE**-0.5)

    return [text() for _ in range(texts)]


def projection() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(HEADS.queries * SIZE, 24).requires_grad_(False)


def fitted(name: str, steps: int, factor: float = 1.0) -> tuple[FeatureMap, float, float, float]:
    """factor: of queries and keys, without an effect on their weights."""
    made = make_map(name, HEADS)
    settings = FitSettings(steps=steps, queries=40)
    texts = [
        Inputs(factor * text.query, factor * text.key, text.value, text.scaling / factor**2) for text in layer_inputs()
    ]
    fit = fit_feature_map(made, REACH, texts, projection(), settings)
    return made, fit.window_error, fit.start_error, fit.error


@pytest.mark.parametrize("name", ["exp", "angular", "binary"])
def test_descent_reduces_the_error_on_held_back_texts(name: str) -> None:
    _, _, start, error = fitted(name, 60)
    assert error < 0.95 * start


def test_a_codebook_starts_better_than_a_window() -> None:
    _, window, start, error = fitted("exp", 60)
    assert error < start < window
    assert error < 0.2 * window


@pytest.mark.parametrize("factor", [0.05, 30.0])
def test_the_scale_of_queries_and_keys_changes_nothing(factor: float) -> None:
    _, window, start, error = fitted("exp", 60, factor)
    assert (window, start) == pytest.approx(fitted("exp", 0)[1:3], rel=1e-3)
    assert error == pytest.approx(fitted("exp", 60)[3], rel=0.1)


def test_errors_are_those_of_the_projected_output() -> None:
    text = layer_inputs()[-1]
    _, window, _, _ = fitted("exp", 0)
    full = scaled_dot_product_attention(text.query, text.key, text.value, is_causal=True, enable_gqa=True)
    i, j = torch.arange(200)[:, None], torch.arange(200)
    near = (j <= i) & ((j > i - REACH.window) | (j < REACH.sinks))
    cut = scaled_dot_product_attention(text.query, text.key, text.value, near, enable_gqa=True)
    measured = torch.linspace(5, 199, 64).long()
    target, output = (projection()(tensor.transpose(1, 2).flatten(2))[:, measured] for tensor in (full, cut))
    assert window == pytest.approx(float((output - target).square().sum() / target.square().sum()), rel=1e-4)


def test_the_same_seed_gives_the_same_map() -> None:
    first, second = fitted("exp", 5)[0], fitted("exp", 5)[0]
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), second.parameters(), strict=True))


def test_texts_without_distant_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="no distant tokens"):
        fit_feature_map(make_map("exp", HEADS), Reach(200, 0), layer_inputs(), projection(), FitSettings())


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_recorded_inputs_give_the_layer_s_output(family: str) -> None:
    model = tiny_model(family)
    module = next(module for module in model.modules() if is_attention(module))
    seen: list[Tensor] = []
    hook = module.get_submodule("o_proj").register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with recorded(module) as inputs:
        model(torch.arange(3, 40)[None], use_cache=False)
    hook.remove()
    (text,) = inputs
    output = scaled_dot_product_attention(
        text.query, text.key, text.value, is_causal=True, scale=text.scaling, enable_gqa=True
    )
    torch.testing.assert_close(output.transpose(1, 2).flatten(2), seen[0])
    model(torch.arange(3, 40)[None], use_cache=False)
    assert len(inputs) == 1
