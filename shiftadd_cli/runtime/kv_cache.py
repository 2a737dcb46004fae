"""Appends to transformers' cache of keys and values without copying its contents.

`DynamicCache` copies all keys and values into a new tensor for every token, which at a thousand tokens takes as long as
the layers of a small model. Here they are in a buffer with room for more, and the cache holds the filled part of it.
The cache works as before: all other operations on it (crop, reorder, copy) see plain tensors.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionCacheLayerMixin

from shiftadd_cli.native.extension import cpu_extension

ROOM = "_shiftadd_room"
# Room added at a time: a quarter of the present tokens, and at least 64.
_SHARE, _LEAST = 4, 64


class _Room(NamedTuple):
    """views: the tensors last assigned to the cache; buffers: the tensors whose beginnings they are, `[rows, heads,
    tokens with room, size]`. Both for keys and values."""

    views: tuple[Tensor, Tensor]
    buffers: tuple[Tensor, Tensor]


def append(cache: Any, keys: Tensor, values: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """Append these `[rows, heads, tokens, size]` and return all keys and values of layer `index`, like `cache.update`.

    For use without gradients. The last dimension of the results is contiguous if the cache is a `DynamicCache`.
    """
    if is_known(cache) and index < len(cache.layers):
        layer = cache.layers[index]
        if type(layer) in _PLAIN and layer.is_initialized and _go_together(layer, keys, values):
            return _append_to(layer, (keys, values))
    result: tuple[Tensor, Tensor] = cache.update(keys, values, index)
    return result


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
    """Whether the layers of a cache hold its whole state, independently of each other."""
    return type(cache) is DynamicCache and not cache.offloading


def _append_to(layer: Any, new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    tokens, added = layer.keys.shape[2], new[0].shape[2]
    buffers = buffers_of(layer, tokens, added)
    for buffer, tensor in zip(buffers, new, strict=True):
        buffer.narrow(2, tokens, added).copy_(tensor)
    return hold(layer, buffers, tokens + added)


def buffers_of(layer: Any, tokens: int, added: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a `DynamicLayer` of `tokens` tokens with room for `added` more, contiguous `[rows, heads,
    tokens with room, size]`; the layer holds the beginning of them."""
    room: _Room | None = layer.__dict__.get(ROOM)
    # Only memory that is not shared may be written: the memory behind tensors that the cache itself still holds.
    unshared = room is not None and room.views[0] is layer.keys and room.views[1] is layer.values
    if room is not None and unshared and _has_room(room, tokens + added):
        return room.buffers
    buffers = (_with_room(layer.keys, added), _with_room(layer.values, added))
    hold(layer, buffers, tokens)
    return buffers


def hold(layer: Any, buffers: tuple[Tensor, Tensor], tokens: int) -> tuple[Tensor, Tensor]:
    """Let a layer hold the first `tokens` tokens of its own buffers, and return them."""
    views = (buffers[0].narrow(2, 0, tokens), buffers[1].narrow(2, 0, tokens))
    layer.keys, layer.values = views
    layer.__dict__[ROOM] = _Room(views, buffers)
    return views


def _has_room(room: _Room, tokens: int) -> bool:
    # Tensors made in inference mode can be written only in that mode, and others only outside it.
    mode = torch.is_inference_mode_enabled()
    return all(buffer.shape[2] >= tokens and buffer.is_inference() == mode for buffer in room.buffers)


def grown_capacity(tokens: int) -> int:
    """The capacity of a buffer, in tokens, after a sequence has grown from one token to `tokens`."""
    capacity = 1
    while capacity < tokens:
        capacity = _capacity(capacity, 1)
    return capacity


def _capacity(tokens: int, added: int) -> int:
    return tokens + added + max(_LEAST, tokens // _SHARE)


def _with_room(old: Tensor, added: int) -> Tensor:
    rows, heads, tokens, size = old.shape
    buffer = torch.empty(rows, heads, _capacity(tokens, added), size, dtype=old.dtype, device=old.device)
    buffer.narrow(2, 0, tokens).copy_(old)
    return buffer


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` that appends without copying its contents."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized or not _go_together(self, key_states, value_states):
            result: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return result
        return _append_to(self, (key_states, value_states))


def growing_cache(model: Any) -> DynamicCache | None:
    """An empty cache for `model.generate` whose layers grow without copying; None for a model that creates its own."""
    parameters = inspect.signature(model.forward).parameters
    if not model._supports_default_dynamic_cache() or "past_key_values" not in parameters:
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


# Layers that hold all tokens, and may be filled by the kernels.
_PLAIN = (DynamicLayer, GrowingLayer)


def reversible_cache(model: Any) -> DynamicCache | None:
    """A `growing_cache` that can `take_back` tokens; None for a model whose state mixes all tokens."""
    cache = growing_cache(model)
    if cache is None or not all(
        isinstance(layer, DynamicLayer) and not isinstance(layer, LinearAttentionCacheLayerMixin)
        for layer in cache.layers
    ):
        return None
    # Layers with a window keep the tokens that leave it, until `take_back`.
    cache.activate_past_recording()
    return cache


def take_back(cache: DynamicCache, tokens: int) -> None:
    """Remove the last `tokens` tokens, 0 or more, from a `reversible_cache`, like `cache.crop(-tokens)`; layers keep
    their room. Call it, with 0 as well, when the tokens that remain are final: layers with a window then drop what
    only taking these back would need."""
    rooms: Rooms | None = cache.layers[0].__dict__.get(_ROOMS, (None,))[0] if cache.layers else None
    if rooms is not None and rooms.layers == cache.layers:
        rooms.tokens -= tokens
        return
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer), "see reversible_cache"
        room: _Room | None = layer.__dict__.get(ROOM)
        if type(layer) in _PLAIN and room is not None and room.views[0] is layer.keys and room.views[1] is layer.values:
            hold(layer, room.buffers, layer.keys.shape[2] - tokens)
        else:
            layer.crop(-tokens)


_ROOMS = "_shiftadd_rooms"


class Rooms:
    """Buffers of cache layers that are equally full.

    layers: these layers; native: their buffers `[rows, heads, capacity, size]`, as the kernels take them; tokens: the
    number filled.
    """

    def __init__(self, layers: Sequence[Any], tokens: int, added: int) -> None:
        """layers: each a `DynamicLayer` or `GrowingLayer` of `tokens` tokens; added: tokens to make room for."""
        self.layers, self.tokens = list(layers), tokens
        self._classes = [type(layer) for layer in layers]
        self._buffers: list[tuple[Tensor, Tensor]] = []
        for index, layer in enumerate(self.layers):
            self._buffers.append(buffers_of(layer, tokens, added))
            layer.__dict__[_ROOMS] = self, index
            # Frees the old tensors before the next layer gets its room.
            layer.keys = layer.values = None
            layer.__class__ = RoomLayer
        keys, values = map(list, zip(*self._buffers, strict=True))
        self.native = cpu_extension().Caches(keys, values)
        self._capacity = min(tensor.shape[2] for tensor in keys)
        rows, heads, _, size = self._buffers[0][0].shape
        self._kind = ((rows, heads, size), self._buffers[0][0].dtype, torch.is_inference_mode_enabled())

    def fit(self, layers: list[Any], shape: tuple[int, int, int], dtype: torch.dtype, added: int) -> bool:
        """Whether these are the layers, of this shape (rows, heads, size), with room for `added` more tokens."""
        # Tensors made in inference mode can be written only in that mode, and others only outside it.
        kind = (shape, dtype, torch.is_inference_mode_enabled())
        return self.tokens + added <= self._capacity and layers == self.layers and kind == self._kind

    def held(self, index: int, which: int) -> Tensor:
        """Keys (0) or values (1) of a layer, `[rows, heads, tokens, size]`."""
        return self._buffers[index][which].narrow(2, 0, self.tokens)

    def close(self) -> None:
        """Turn the layers back into plain ones with the same contents."""
        for layer, kind, buffers in zip(self.layers, self._classes, self._buffers, strict=True):
            layer.__class__ = kind
            del layer.__dict__[_ROOMS]
            hold(layer, buffers, self.tokens)


class RoomLayer(DynamicLayer):
    """A layer, converted in place, whose keys and values are the beginnings of buffers in `Rooms`."""

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
        rooms, index = self.__dict__[_ROOMS]
        result: Tensor = rooms.held(index, which)
        return result

    def _leave(self) -> None:
        """Become a plain layer, together with all others in these rooms."""
        rooms, _ = self.__dict__[_ROOMS]
        rooms.close()

    def __reduce_ex__(self, _: Any) -> tuple[Any, ...]:
        # A copy does not share the buffers.
        state = {name: value for name, value in self.__dict__.items() if name not in (ROOM, _ROOMS)}
        return _plain_layer, (), state | {"keys": self.keys, "values": self.values}


def _plain_layer() -> DynamicLayer:
    return DynamicLayer.__new__(DynamicLayer)


def open_rooms(cache: Any, count: int, shape: tuple[int, int, int], dtype: torch.dtype, added: int = 1) -> Rooms | None:
    """Room for `added` more tokens in the first `count` layers of a cache. None unless all are of this shape (rows,
    heads, size) and dtype, on a CPU, and equally full. The caller that fills it must add their number to `tokens`."""
    if not is_known(cache) or len(cache.layers) < count:
        return None
    layers = cache.layers[:count]
    rooms: Rooms | None = layers[0].__dict__.get(_ROOMS, (None,))[0]
    if rooms is not None:
        if rooms.fit(layers, shape, dtype, added):
            return rooms
        rooms.close()
    if any(type(layer) not in _PLAIN or not layer.is_initialized for layer in layers):
        return None
    tokens = layers[0].keys.shape[2]
    expected = torch.Size((*shape[:2], tokens, shape[2]))
    tensors = (tensor for layer in layers for tensor in (layer.keys, layer.values))
    if any(tensor.shape != expected or tensor.dtype != dtype or not tensor.is_cpu for tensor in tensors):
        return None
    return Rooms(layers, tokens, added)
