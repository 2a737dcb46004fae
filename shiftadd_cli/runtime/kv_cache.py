"""Appending to transformers' cache of keys and values without copying what it holds.

`DynamicCache` makes every token's keys and values a new tensor of all, which at a thousand tokens takes as long as the
layers of a small model. Here they lie in a buffer with room for more, of which the cache holds the part that is filled.
The cache stays what it was: whatever else is done to it (crop, reorder, copy) is done to plain tensors.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

ROOM = "_shiftadd_room"
# Room that is made at a time: a quarter of what is there, and some.
_SHARE, _LEAST = 4, 64


class _Room(NamedTuple):
    """held: the very tensors that the cache was given last; buffers: what they are the beginning of, `[rows, heads,
    tokens with room, size]`. Both for keys and values."""

    held: tuple[Tensor, Tensor]
    buffers: tuple[Tensor, Tensor]


def append(cache: Any, keys: Tensor, values: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """What `cache.update` does: all keys and values of layer `index` after these `[rows, heads, tokens, size]`.

    For use without gradients. The last dimension of what it gives is contiguous where the cache is a `DynamicCache`.
    """
    if is_known(cache) and index < len(cache.layers):
        layer = cache.layers[index]
        if type(layer) is DynamicLayer and layer.is_initialized and _go_together(layer, keys, values):
            return _append_to(layer, (keys, values))
    found: tuple[Tensor, Tensor] = cache.update(keys, values, index)
    return found


def _go_together(layer: Any, keys: Tensor, values: Tensor) -> bool:
    return all(
        old.ndim == 4
        and old.dtype == new.dtype
        and old.device == new.device
        and old.shape[:2] == new.shape[:2]
        and old.shape[3] == new.shape[3]
        for old, new in ((layer.keys, keys), (layer.values, values))
    )


def is_known(cache: Any) -> bool:
    """Whether a cache is one that is all in its layers, each in its own way."""
    return type(cache) is DynamicCache and not cache.offloading


def _append_to(layer: Any, new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    tokens, added = layer.keys.shape[2], new[0].shape[2]
    buffers = buffers_of(layer, tokens, added)
    for buffer, each in zip(buffers, new, strict=True):
        buffer.narrow(2, tokens, added).copy_(each)
    return hold(layer, buffers, tokens + added)


def buffers_of(layer: Any, tokens: int, added: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a `DynamicLayer` of so many tokens with room for more, contiguous `[rows, heads, tokens with
    room, size]`; the layer holds the beginning of them."""
    room: _Room | None = layer.__dict__.get(ROOM)
    # Only what nobody else was given may be written to: the place behind the tensors that the cache itself still holds.
    mine = room is not None and room.held[0] is layer.keys and room.held[1] is layer.values
    if room is not None and mine and _has_room(room, tokens + added):
        return room.buffers
    buffers = (_with_room(layer.keys, added), _with_room(layer.values, added))
    hold(layer, buffers, tokens)
    return buffers


def hold(layer: Any, buffers: tuple[Tensor, Tensor], tokens: int) -> tuple[Tensor, Tensor]:
    """Let a layer hold the first tokens of buffers that are its own; returns what it holds."""
    held = (buffers[0].narrow(2, 0, tokens), buffers[1].narrow(2, 0, tokens))
    layer.keys, layer.values = held
    layer.__dict__[ROOM] = _Room(held, buffers)
    return held


def _has_room(room: _Room, tokens: int) -> bool:
    # What inference mode made can be written to in it alone, and the other way round.
    mode = torch.is_inference_mode_enabled()
    return all(each.shape[2] >= tokens and each.is_inference() == mode for each in room.buffers)


def _with_room(old: Tensor, added: int) -> Tensor:
    rows, heads, tokens, size = old.shape
    capacity = tokens + added + max(_LEAST, tokens // _SHARE)
    buffer = torch.empty(rows, heads, capacity, size, dtype=old.dtype, device=old.device)
    buffer.narrow(2, 0, tokens).copy_(old)
    return buffer


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` that appends without copying what it holds."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized or not _go_together(self, key_states, value_states):
            found: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return found
        return _append_to(self, (key_states, value_states))


def growing_cache(model: Any) -> DynamicCache | None:
    """An empty cache for `model.generate` whose layers grow without copying; None for a model that makes its own."""
    taken = inspect.signature(model.forward).parameters
    if not model._supports_default_dynamic_cache() or "past_key_values" not in taken:
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


_ROOMS = "_shiftadd_rooms"


class Rooms:
    """Buffers of layers of a cache, which are filled alike.

    layers: those layers; keys, values: addresses of the buffers of each, contiguous `[rows, heads, capacity, size]`;
    capacities: of each; tokens: how many are filled.
    """

    def __init__(self, layers: Sequence[Any], tokens: int) -> None:
        """layers: each a `DynamicLayer` of so many tokens."""
        self.layers, self.tokens = list(layers), tokens
        self._buffers: list[tuple[Tensor, Tensor]] = []
        for place, layer in enumerate(self.layers):
            self._buffers.append(buffers_of(layer, tokens, 1))
            layer.__dict__[_ROOMS] = self, place
            # What it held may go before the next one gets its room.
            layer.keys = layer.values = None
            layer.__class__ = RoomLayer
        self.keys = [keys.data_ptr() for keys, _ in self._buffers]
        self.values = [values.data_ptr() for _, values in self._buffers]
        self.capacities = [keys.shape[2] for keys, _ in self._buffers]
        self._capacity = min(self.capacities)
        rows, heads, _, size = self._buffers[0][0].shape
        self._kind = ((rows, heads, size), self._buffers[0][0].dtype, torch.is_inference_mode_enabled())

    def fit(self, layers: list[Any], shape: tuple[int, int, int], dtype: torch.dtype) -> bool:
        """Whether these are the layers, of this shape (rows, heads, size), and there is room for one more token."""
        # What inference mode made can be written to in it alone, and the other way round.
        kind = (shape, dtype, torch.is_inference_mode_enabled())
        return self.tokens < self._capacity and layers == self.layers and kind == self._kind

    def held(self, place: int, which: int) -> Tensor:
        """Keys (0) or values (1) of a layer, `[rows, heads, tokens, size]`."""
        return self._buffers[place][which].narrow(2, 0, self.tokens)

    def close(self) -> None:
        """Make the layers plain ones again, that hold what they hold."""
        for layer, buffers in zip(self.layers, self._buffers, strict=True):
            layer.__class__ = DynamicLayer
            del layer.__dict__[_ROOMS]
            hold(layer, buffers, self.tokens)


class RoomLayer(DynamicLayer):
    """A layer whose keys and values are the beginnings of buffers in `Rooms`; made of a `DynamicLayer` in place."""

    @property
    def keys(self) -> Tensor:
        return self._held(0)

    @keys.setter
    def keys(self, new: Tensor | None) -> None:
        self._leave()
        self.keys = new

    @property
    def values(self) -> Tensor:
        return self._held(1)

    @values.setter
    def values(self, new: Tensor | None) -> None:
        self._leave()
        self.values = new

    def _held(self, which: int) -> Tensor:
        rooms, place = self.__dict__[_ROOMS]
        found: Tensor = rooms.held(place, which)
        return found

    def _leave(self) -> None:
        """Become a plain layer, as all others in these rooms."""
        rooms, _ = self.__dict__[_ROOMS]
        rooms.close()

    def __reduce_ex__(self, _: Any) -> tuple[Any, ...]:
        # A copy has no part in the buffers.
        state = {name: value for name, value in self.__dict__.items() if name not in (ROOM, _ROOMS)}
        return _plain_layer, (), state | {"keys": self.keys, "values": self.values}


def _plain_layer() -> DynamicLayer:
    return DynamicLayer.__new__(DynamicLayer)


def open_rooms(cache: Any, count: int, shape: tuple[int, int, int], dtype: torch.dtype) -> Rooms | None:
    """Room for one more token in the first `count` layers of a cache, or None where they are not all of this shape
    (rows, heads, size) and dtype, on a CPU, and filled alike. After it is filled, `tokens` is to be one more."""
    if not is_known(cache) or len(cache.layers) < count:
        return None
    layers = cache.layers[:count]
    found: Rooms | None = layers[0].__dict__.get(_ROOMS, (None,))[0]
    if found is not None:
        if found.fit(layers, shape, dtype):
            return found
        found.close()
    if any(type(layer) is not DynamicLayer or not layer.is_initialized for layer in layers):
        return None
    tokens = layers[0].keys.shape[2]
    wanted = torch.Size((*shape[:2], tokens, shape[2]))
    numbers = (each for layer in layers for each in (layer.keys, layer.values))
    if any(each.shape != wanted or each.dtype != dtype or not each.is_cpu for each in numbers):
        return None
    return Rooms(layers, tokens)
