"""The base class of layers that hold their weight in stored tensors instead of numbers of the model's dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class StoredWeight(nn.Module):
    """A module that replaces one with a `weight` and keeps that weight in other tensors.

    These are data, not numbers of the model's dtype: `.to(dtype)`, `.half()` and the like leave them unchanged and
    convert everything else. A subclass calls `_stand_for` before it computes.
    """

    _stored: tuple[str, ...]
    _shape: tuple[int, ...]
    _dtype: torch.dtype

    def _stand_for(self, stored: Sequence[str], shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
        """stored: names of the parameters and buffers that hold the weight, the largest first; shape: of the weight;
        dtype: the value of `weight.dtype`, the default dtype if None."""
        self._stored = tuple(stored)
        self._shape = shape
        self._dtype = dtype or torch.get_default_dtype()

    def _let_go(self) -> None:
        """Undo `_stand_for`, and remove the stored tensors, before the module becomes another one."""
        for name in self._stored:
            self._parameters.pop(name, None)
            self._buffers.pop(name, None)
        del self._stored, self._shape, self._dtype

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Names of the stored tensors, the largest first."""
        return self._stored

    @property
    def weight(self) -> Tensor:
        """Stand-in with the weight's shape, the layer's dtype and its device, for code that asks a layer for these.

        It takes no memory and is not in the state dict. Its values are NaN, so that any use in a computation shows.
        """
        value = torch.full((), torch.nan, dtype=self._dtype, device=self._device).expand(self._shape)
        # Some models (GPT-2) initialise the weights of their linears by name unless transformers' mark is set.
        value._is_hf_initialized = True  # type: ignore[attr-defined]
        return value

    @property
    def _device(self) -> torch.device:
        device: torch.device = getattr(self, self._stored[0]).device
        return device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StoredWeight:
        stored = {id(getattr(self, name)) for name in self._stored}

        def keep_stored_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in stored and moved.dtype != tensor.dtype:
                # bfloat16 row scales overflow in float16 and could not be restored.
                return tensor.to(moved.device)
            return moved

        # A layer without a bias would otherwise miss a change of dtype.
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=self._device)).dtype
        super()._apply(keep_stored_dtype, recurse)
        return self
