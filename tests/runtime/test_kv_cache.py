"""A cache that grows in place, compared with transformers' own after any sequence of operations."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from caches import assert_same, crop, reorder
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from shiftadd_cli.runtime.kv_cache import Rooms, append, growing_cache, open_rooms, reversible_cache, take_back


def numbers(rows: int, tokens: int, seed: int, size: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 2, tokens, size, generator=generator), torch.randn(rows, 2, tokens, 6, generator=generator)


def dynamic_layers(cache: DynamicCache) -> list[DynamicLayer]:
    layers = [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
    assert len(layers) == len(cache.layers)
    return layers


def layer_keys(cache: DynamicCache) -> list[Tensor]:
    """The keys of every layer, none of which is empty."""
    keys = [layer.keys for layer in dynamic_layers(cache) if layer.keys is not None]
    assert len(keys) == len(cache.layers)
    return keys


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.sampled_from(["append", "append", "append", "crop", "reorder", "copy", "inference"]), max_size=60)
)
def test_appended_cache_equals_the_plain_cache(steps: list[str]) -> None:
    mine, plain = DynamicCache(), DynamicCache()
    returned: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for number, step in enumerate(["append", *steps]):
            if step in ("append", "inference"):
                with torch.inference_mode(step == "inference"):
                    for layer in range(2):
                        new = numbers(3, 1 + number % 4, 10 * number + layer)
                        result = append(mine, *new, layer)
                        expected = plain.update(*new, layer)
                        assert all(map(torch.equal, result, expected))
                        returned += zip(result, expected, strict=True)
            elif step == "crop":
                crop((mine, plain))
            elif step == "reorder":
                reorder((mine, plain))
            else:
                mine = copy.deepcopy(mine)
    assert_same(mine, plain)
    # Tensors returned earlier have not changed.
    assert all(torch.equal(*pair) for pair in returned)


def test_most_appended_tokens_move_no_buffer() -> None:
    cache = DynamicCache()
    addresses = []
    with torch.no_grad():
        for number in range(400):
            keys, _ = append(cache, *numbers(1, 1, number), 0)
            addresses.append(keys.data_ptr())
    assert len(set(addresses)) <= 8


def test_caches_that_share_tensors_do_not_overwrite_each_other() -> None:
    first, second = DynamicCache(), DynamicCache()
    with torch.no_grad():
        append(first, *numbers(1, 3, 0), 0)
        append(first, *numbers(1, 1, 1), 0)
        second.update(*numbers(1, 3, 0), 0)
        (source,), (target,) = dynamic_layers(first), dynamic_layers(second)
        target.keys, target.values = source.keys, source.values
        one = append(first, *numbers(1, 1, 2), 0)[0]
        other = append(second, *numbers(1, 1, 3), 0)[0]
    assert torch.equal(one[:, :, -1:], numbers(1, 1, 2)[0])
    assert torch.equal(other[:, :, -1:], numbers(1, 1, 3)[0])


def test_mismatched_tensors_are_left_to_the_cache() -> None:
    cache = DynamicCache()
    append(cache, *numbers(1, 3, 0), 0)
    with pytest.raises(RuntimeError, match=r"[Ss]izes of tensors must match"):
        append(cache, *numbers(2, 1, 1), 0)
    # Tensors of another dtype are promoted, as by `torch.cat`.
    new_keys, new_values = (tensor.double() for tensor in numbers(1, 1, 1))
    keys, _ = append(cache, new_keys, new_values, 0)
    assert keys.dtype == torch.float64


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(min_value=1, max_value=40), min_size=1, max_size=30))
def test_growing_cache_equals_the_plain_cache(lengths: list[int]) -> None:
    growing = growing_cache(tiny_model("llama"))
    assert growing is not None
    plain = DynamicCache()
    with torch.no_grad():
        for number, tokens in enumerate(lengths):
            for layer in range(2):
                new = numbers(3, tokens, 10 * number + layer)
                result, expected = growing.update(*new, layer), plain.update(*new, layer)
                assert all(map(torch.equal, result, expected))
    assert_same(growing, plain)


def test_sliding_window_layers_stay_unchanged() -> None:
    cache = growing_cache(tiny_model("gemma3"))
    assert cache is not None
    assert [layer.is_sliding for layer in dynamic_layers(cache)] == [True, False, True]


def test_model_with_its_own_state_gets_no_growing_cache() -> None:
    assert growing_cache(tiny_model("mamba")) is None


LAYERS, SHAPE = 3, (3, 2, 4)


def keys_and_values(tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    keys, values = torch.randn(2, 3, 2, tokens, 4, generator=torch.Generator().manual_seed(seed))
    return keys, values


def filled(tokens: int = 5) -> DynamicCache:
    cache = DynamicCache()
    for layer in range(LAYERS):
        cache.update(*keys_and_values(tokens, layer), layer)
    return cache


def put(rooms: Rooms, seed: int) -> None:
    """Write one token after the others, as the kernels do."""
    for layer, (keys, values) in enumerate(rooms._buffers):
        fresh = keys_and_values(1, 10 * seed + layer)
        keys[:, :, rooms.tokens], values[:, :, rooms.tokens] = (tensor[:, :, 0] for tensor in fresh)
    rooms.tokens += 1


STEPS = ["put", "put", "put", "append", "update", "crop", "reorder", "copy", "pickle", "inference", "look"]


@settings(max_examples=80, deadline=None)
@given(steps=st.lists(st.sampled_from(STEPS), max_size=40))
def test_cache_with_rooms_equals_the_plain_cache(steps: list[str]) -> None:
    mine, plain = filled(), filled()
    returned: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for number, step in enumerate(steps, 1):
            if step in ("put", "inference"):
                with torch.inference_mode(step == "inference"):
                    rooms = open_rooms(mine, LAYERS, SHAPE, torch.float32)
                    assert rooms is not None
                    put(rooms, number)
                    for layer in range(LAYERS):
                        plain.update(*keys_and_values(1, 10 * number + layer), layer)
            elif step in ("append", "update"):
                for layer in range(LAYERS):
                    fresh = keys_and_values(1 + number % 3, 10 * number + layer)
                    plain.update(*fresh, layer)
                    if step == "append":
                        append(mine, *fresh, layer)
                    else:
                        mine.update(*fresh, layer)
            elif step == "crop":
                crop((mine, plain))
            elif step == "reorder":
                reorder((mine, plain))
            elif step == "copy":
                mine = copy.deepcopy(mine)
            elif step == "pickle":
                file = io.BytesIO()
                torch.save(mine, file)
                file.seek(0)
                mine = torch.load(file, weights_only=False)
                assert all(type(layer) is DynamicLayer for layer in mine.layers)
            else:
                # Tensors returned earlier must not change.
                returned += [(keys, keys.clone()) for keys in layer_keys(mine)]
    assert_same(mine, plain)
    assert all(torch.equal(*pair) for pair in returned)


def test_most_tokens_in_rooms_move_no_buffer() -> None:
    cache = filled()
    addresses = set()
    for number in range(400):
        rooms = open_rooms(cache, LAYERS, SHAPE, torch.float32)
        assert rooms is not None
        put(rooms, number)
        addresses.add(tuple(keys.data_ptr() for keys in layer_keys(cache)))
    assert len(addresses) <= 8
    assert cache.get_seq_length() == 405


def test_new_token_does_not_change_a_copy() -> None:
    cache = filled()
    rooms = open_rooms(cache, LAYERS, SHAPE, torch.float32)
    assert rooms is not None
    twin = copy.deepcopy(cache)
    put(rooms, 1)
    other = open_rooms(twin, LAYERS, SHAPE, torch.float32)
    assert other is not None
    put(other, 2)
    assert not torch.equal(layer_keys(cache)[0], layer_keys(twin)[0])
    assert torch.equal(layer_keys(cache)[0][:, :, :5], layer_keys(twin)[0][:, :, :5])


@pytest.mark.parametrize("case", ["few layers", "rows", "type", "unequal", "empty", "other cache"])
def test_mismatched_cache_gets_no_rooms(case: str) -> None:
    cache, shape, dtype, count = filled(), SHAPE, torch.float32, LAYERS
    if case == "few layers":
        count = LAYERS + 1
    elif case == "rows":
        shape = (2, 2, 4)
    elif case == "type":
        dtype = torch.bfloat16
    elif case == "unequal":
        cache.update(*keys_and_values(1, 7), 1)
    elif case == "empty":
        cache = DynamicCache()
    else:

        class Other(DynamicCache):
            pass

        cache = Other()
        for layer in range(LAYERS):
            cache.update(*keys_and_values(5, layer), layer)
    assert open_rooms(cache, count, shape, dtype) is None
    # The cache is then unchanged, even if it had rooms.
    if case in ("rows", "type"):
        assert open_rooms(cache, LAYERS, SHAPE, torch.float32) is not None
        assert open_rooms(cache, count, shape, dtype) is None
        assert_same(cache, filled())


@settings(max_examples=40, deadline=None)
@given(
    family=st.sampled_from(["llama", "gemma3"]),
    steps=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=20),
)
def test_tokens_taken_back_leave_no_trace(family: str, steps: list[tuple[int, int]]) -> None:
    """steps: numbers of tokens that are appended, and of those that are then taken back."""
    model = tiny_model(family)
    mine = reversible_cache(model)
    assert mine is not None
    kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in mine.layers]
    with torch.no_grad():
        for number, (added, removed) in enumerate([(3, 0), *steps]):
            removed = min(removed, added)
            for layer, chunks in enumerate(kept):
                new = numbers(2, added, 10 * number + layer)
                keys, values = mine.update(*new, layer)
                chunks.append(new)
                whole = [torch.cat([chunk[which] for chunk in chunks], dim=2) for which in (0, 1)]
                # What a window has left out is the beginning.
                assert torch.equal(keys, whole[0][:, :, -keys.shape[2] :])
                assert torch.equal(values, whole[1][:, :, -values.shape[2] :])
                window = getattr(mine.layers[layer], "sliding_window", None)
                assert keys.shape[2] == min(whole[0].shape[2], window + added - 1 if window else 10**6)
                chunks[-1] = (new[0][:, :, : added - removed], new[1][:, :, : added - removed])
            take_back(mine, removed)
            assert mine.get_seq_length() == sum(chunk[0].shape[2] for chunk in kept[0])


def test_tokens_taken_back_keep_the_room() -> None:
    cache = reversible_cache(tiny_model("llama"))
    assert cache is not None
    addresses = set()
    with torch.no_grad():
        for number in range(300):
            for layer in range(2):
                keys, _ = cache.update(*numbers(1, 5, number), layer)
                addresses.add(keys.data_ptr())
            take_back(cache, 4)
    assert len(addresses) <= 16


def test_states_that_mix_all_tokens_are_not_reversible() -> None:
    for family in ("mamba", "jamba", "zamba2"):
        assert reversible_cache(tiny_model(family)) is None
