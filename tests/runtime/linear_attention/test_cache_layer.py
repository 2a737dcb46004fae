"""The cache layer of linear attention, compared with the formula for any way of feeding it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_attention import by_formula, filled_map
from torch import Tensor

from shiftadd_cli.artifact.linear_attention import MAP_TENSORS, Heads
from shiftadd_cli.errors import LinearAttentionError
from shiftadd_cli.runtime.linear_attention.attention import Reach
from shiftadd_cli.runtime.linear_attention.cache_layer import MARGIN, LinearLayer
from shiftadd_cli.runtime.linear_attention.feature_maps import FeatureMap

SIZE = 4
HEADS = Heads(queries=4, keys=2, size=SIZE)
SCALING = SIZE**-0.5


def inputs(rows: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of four heads, keys and values of two."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, 4, tokens, SIZE, generator=generator),
        torch.randn(rows, 2, tokens, SIZE, generator=generator),
        torch.randn(rows, 2, tokens, SIZE, generator=generator),
    )


def causal_mask(first: list[int], new: int, seen: int) -> Tensor:
    positions = torch.arange(seen)
    begins = torch.tensor(first)[:, None, None]
    return ((positions >= begins) & (positions <= positions[-new:, None]))[:, None]


def fed(layer: LinearLayer, parts: list[int], tensors: tuple[Tensor, Tensor, Tensor], first: list[int]) -> Tensor:
    """Outputs of all tokens, given to the layer in parts of these lengths."""
    query, key, value = tensors
    outputs, start = [], 0
    for length in parts:
        own = slice(start, start + length)
        layer.update(key[:, :, own], value[:, :, own])
        mask = causal_mask(first, length, start + length) if any(first) else None
        outputs.append(layer.attend(query[:, :, own], mask, SCALING))
        start += length
    return torch.cat(outputs, 2)


def real(outputs: Tensor, first: list[int]) -> Tensor:
    """Outputs of padding set to zero."""
    positions = torch.arange(outputs.shape[2])
    return torch.where((positions >= torch.tensor(first)[:, None])[:, None, :, None], outputs.double(), 0.0)


@pytest.mark.parametrize("name", MAP_TENSORS)
@settings(max_examples=25, deadline=None)
@given(
    parts=st.lists(st.sampled_from([1, 1, 2, 7, 40, 90]), min_size=1, max_size=4),
    window=st.integers(1, 9),
    sinks=st.integers(0, 3),
    padding=st.integers(0, 30),
)
def test_every_way_of_feeding_gives_the_formula(
    name: str, parts: list[int], window: int, sinks: int, padding: int
) -> None:
    feature_map, reach, tokens = filled_map(name, HEADS), Reach(window, sinks), sum(parts)
    first = [0, min(padding, tokens - 1)]
    tensors = inputs(2, tokens)
    with torch.no_grad():
        outputs = fed(LinearLayer(feature_map, reach), parts, tensors, first)
    torch.testing.assert_close(
        real(outputs, first), by_formula(*tensors, feature_map, reach, first), rtol=2e-4, atol=2e-5
    )


def test_long_prompts_equal_single_tokens_across_all_edges() -> None:
    feature_map, reach = filled_map("exp", HEADS), Reach(5, 2)
    tensors = inputs(2, 700)
    with torch.no_grad():
        prompt = fed(LinearLayer(feature_map, reach), [700], tensors, [0, 300])
        single = fed(LinearLayer(feature_map, reach), [1] * 700, tensors, [0, 300])
    torch.testing.assert_close(real(prompt, [0, 300]), real(single, [0, 300]), rtol=1e-4, atol=1e-5)


def test_a_wide_window_is_softmax_attention() -> None:
    query, key, value = inputs(2, 80)
    layer = LinearLayer(filled_map("angular", HEADS), Reach(80, 0))
    with torch.no_grad():
        outputs = fed(layer, [50, 30], (query, key, value), [0, 0])
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(outputs, expected)


def stored_numbers(layer: LinearLayer) -> int:
    tensors = (layer.keys, layer.values, layer.sink_keys, layer.sink_values, layer.state.values, layer.state.weights)
    return sum(tensor.numel() for tensor in tensors)


def test_the_state_does_not_grow() -> None:
    layer = LinearLayer(filled_map("exp", HEADS), Reach(8, 2))
    sizes = []
    with torch.no_grad():
        for number in range(600):
            query, key, value = inputs(1, 1, number)
            layer.update(key, value)
            layer.attend(query, None, SCALING)
            sizes.append(stored_numbers(layer))
    assert max(sizes[300:]) == max(sizes[:300])
    assert layer.get_seq_length() == 600


@pytest.mark.parametrize("removed", [1, 7, MARGIN])
def test_tokens_taken_back_leave_no_trace(removed: int) -> None:
    feature_map, reach = filled_map("exp", HEADS), Reach(6, 2)
    query, key, value = inputs(1, 400)
    wrong = inputs(1, removed, 1)
    plain, drafted = LinearLayer(feature_map, reach), LinearLayer(feature_map, reach)
    with torch.no_grad():
        expected = fed(plain, [350] + [1] * 50, (query, key, value), [0])[:, :, -50:]
        fed(drafted, [350], (query[:, :, :350], key[:, :, :350], value[:, :, :350]), [0])
        outputs = []
        for number in range(350, 400):
            drafted.update(*wrong[1:])
            drafted.attend(wrong[0], None, SCALING)
            drafted.crop(-removed)
            own = slice(number, number + 1)
            drafted.update(key[:, :, own], value[:, :, own])
            outputs.append(drafted.attend(query[:, :, own], None, SCALING))
    torch.testing.assert_close(torch.cat(outputs, 2), expected, rtol=1e-4, atol=1e-5)


def test_tokens_in_the_state_cannot_be_taken_back() -> None:
    layer = LinearLayer(filled_map("exp", HEADS), Reach(6, 2))
    with torch.no_grad():
        fed(layer, [600], inputs(1, 600), [0])
    with pytest.raises(LinearAttentionError, match="can take back"):
        layer.crop(-500)
    with pytest.raises(ValueError, match="as a negative number"):
        layer.crop(500)


def beams(layer: LinearLayer) -> None:
    layer.reorder_cache(torch.tensor([1, 1]))


def repeat_and_select(layer: LinearLayer) -> None:
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([2, 3]))


@pytest.mark.parametrize("change", [beams, repeat_and_select])
def test_rows_can_be_rearranged(change: Callable[[LinearLayer], None]) -> None:
    feature_map: FeatureMap = filled_map("exp", HEADS)
    layer, first = LinearLayer(feature_map, Reach(6, 2)), [0, 9]
    query, key, value = inputs(2, 301)
    with torch.no_grad():
        fed(layer, [300], (query[:, :, :300], key[:, :, :300], value[:, :, :300]), first)
        alone = copy.deepcopy(layer)
        layer.update(key[:, :, 300:], value[:, :, 300:])
        expected = layer.attend(query[:, :, 300:], causal_mask(first, 1, 301), SCALING)[1]
        change(alone)
        alone.update(*(tensor[1:, :, 300:].repeat(2, 1, 1, 1) for tensor in (key, value)))
        outputs = alone.attend(query[1:, :, 300:].repeat(2, 1, 1, 1), causal_mask([9, 9], 1, 301), SCALING)
    torch.testing.assert_close(outputs, expected.expand_as(outputs))


def test_masks_that_hide_more_than_padding_are_refused() -> None:
    layer = LinearLayer(filled_map("exp", HEADS), Reach(6, 2))
    query, key, value = inputs(1, 40)
    layer.update(key, value)
    mask = causal_mask([0], 40, 40)
    mask[:, :, 30:, 20] = False
    with pytest.raises(LinearAttentionError, match="padding on the left"):
        layer.attend(query, mask, SCALING)


def test_added_masks_are_read_like_those_of_bool() -> None:
    feature_map, first = filled_map("exp", HEADS), [3, 0]
    query, key, value = inputs(2, 120)
    mask = causal_mask(first, 120, 120)
    results = []
    for form in (mask, torch.where(mask, 0.0, torch.finfo(torch.float32).min)):
        layer = LinearLayer(feature_map, Reach(6, 2))
        layer.update(key, value)
        results.append(layer.attend(query, form, SCALING))
    assert torch.equal(*results)


def test_no_output_depends_on_later_tokens() -> None:
    layer = LinearLayer(filled_map("exp", HEADS), Reach(6, 2))
    query, key, value = (tensor.requires_grad_() for tensor in inputs(1, 300))
    layer.update(key, value)
    layer.attend(query, None, SCALING)[:, :, 200].sum().backward()
    for tensor in (query, key, value):
        assert tensor.grad is not None
        assert not tensor.grad[:, :, 201:].any()
    # The gradient of a key that is in the state.
    assert key.grad is not None
    assert key.grad[:, :, 100].any()
