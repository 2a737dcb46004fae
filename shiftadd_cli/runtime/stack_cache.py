"""Room for new tokens in all layers of transformers' cache at once.

The kernels that compute all blocks in one call put keys and values into buffers, so nothing is to be done for a layer
but to count. Its `keys` and `values` are made when somebody asks for them; and as soon as somebody sets them (crop,
reorder, update), all layers are what they were, with tensors of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from shiftadd_cli.runtime.growing_cache import ROOM, buffers_of, hold, is_known

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
