"""Room in all layers of a cache at once against transformers' own cache, whatever else is done to it."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from caches import assert_same, crop, reorder
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from shiftadd_cli.runtime.growing_cache import append
from shiftadd_cli.runtime.stack_cache import Rooms, open_rooms

LAYERS, SHAPE = 3, (3, 2, 4)


def numbers(tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    keys, values = torch.randn(2, 3, 2, tokens, 4, generator=torch.Generator().manual_seed(seed))
    return keys, values


def filled(tokens: int = 5) -> DynamicCache:
    cache = DynamicCache()
    for layer in range(LAYERS):
        cache.update(*numbers(tokens, layer), layer)
    return cache


def put(rooms: Rooms, seed: int) -> None:
    """What the kernels do: one token behind those held."""
    for place, (keys, values) in enumerate(rooms._buffers):
        fresh = numbers(1, 10 * seed + place)
        keys[:, :, rooms.tokens], values[:, :, rooms.tokens] = (each[:, :, 0] for each in fresh)
    rooms.tokens += 1


STEPS = ["put", "put", "put", "append", "update", "crop", "reorder", "copy", "pickle", "inference", "look"]


@settings(max_examples=80, deadline=None)
@given(steps=st.lists(st.sampled_from(STEPS), max_size=40))
def test_it_holds_what_the_plain_cache_holds(steps: list[str]) -> None:
    mine, plain = filled(), filled()
    seen: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for number, step in enumerate(steps, 1):
            if step in ("put", "inference"):
                with torch.inference_mode(step == "inference"):
                    rooms = open_rooms(mine, LAYERS, SHAPE, torch.float32)
                    assert rooms is not None
                    put(rooms, number)
                    for layer in range(LAYERS):
                        plain.update(*numbers(1, 10 * number + layer), layer)
            elif step in ("append", "update"):
                for layer in range(LAYERS):
                    fresh = numbers(1 + number % 3, 10 * number + layer)
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
                # What was given out stays what it was.
                seen += [(layer.keys, layer.keys.clone()) for layer in mine.layers]
    assert_same(mine, plain)
    assert all(torch.equal(*pair) for pair in seen)


def test_most_tokens_move_nothing() -> None:
    cache = filled()
    places = set()
    for number in range(400):
        rooms = open_rooms(cache, LAYERS, SHAPE, torch.float32)
        assert rooms is not None
        assert rooms.keys == [layer.keys.data_ptr() for layer in cache.layers]
        put(rooms, number)
        places.add(tuple(rooms.values))
    assert len(places) <= 8
    assert cache.get_seq_length() == 405


def test_one_token_behind_another_does_not_touch_what_a_copy_holds() -> None:
    cache = filled()
    rooms = open_rooms(cache, LAYERS, SHAPE, torch.float32)
    assert rooms is not None
    twin = copy.deepcopy(cache)
    put(rooms, 1)
    other = open_rooms(twin, LAYERS, SHAPE, torch.float32)
    assert other is not None
    put(other, 2)
    assert not torch.equal(cache.layers[0].keys, twin.layers[0].keys)
    assert torch.equal(cache.layers[0].keys[:, :, :5], twin.layers[0].keys[:, :, :5])


@pytest.mark.parametrize("case", ["few layers", "rows", "type", "unequal", "empty", "other cache"])
def test_what_does_not_go_together_gets_no_room(case: str) -> None:
    cache, shape, dtype, count = filled(), SHAPE, torch.float32, LAYERS
    if case == "few layers":
        count = LAYERS + 1
    elif case == "rows":
        shape = (2, 2, 4)
    elif case == "type":
        dtype = torch.bfloat16
    elif case == "unequal":
        cache.update(*numbers(1, 7), 1)
    elif case == "empty":
        cache = DynamicCache()
    else:

        class Other(DynamicCache):
            pass

        cache = Other()
        for layer in range(LAYERS):
            cache.update(*numbers(5, layer), layer)
    assert open_rooms(cache, count, shape, dtype) is None
    # It is then as it was, also where it had room.
    if case in ("rows", "type"):
        assert open_rooms(cache, LAYERS, SHAPE, torch.float32) is not None
        assert open_rooms(cache, count, shape, dtype) is None
        assert_same(cache, filled())
