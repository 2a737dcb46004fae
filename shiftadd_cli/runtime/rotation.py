"""Rotated inputs, computed once for all linears that read the same tensor (query, key and value; gate and up)."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from shiftadd_cli.bcq.rotation import rotate_input
from shiftadd_cli.kernels import ops
from shiftadd_cli.native.extension import has_kernels
from shiftadd_cli.runtime.linear import PackedLinear


class SharedRotation:
    """Rotates inputs by the signs of one layer and remembers the last result while its input lives.

    A tensor that has changed in place since, or that comes again under another gradient mode, is rotated again. The
    state is a single tuple, so threads may race for it without harm.
    """

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[Tensor], tuple[int, bool], Tensor] | None = None

    def __call__(self, x: Tensor, signs: Tensor) -> Tensor:
        """R x for `x` `[..., in]` and `signs` ±1 `[in]`."""
        # Inference tensors have no version counter, and a compiler has no tensors to remember.
        if torch.compiler.is_compiling() or x.is_inference():
            return rotate(x, signs)
        state = (x._version, torch.is_grad_enabled())
        last = self._last
        if last is not None and last[0]() is x and last[1] == state:
            return last[2]
        rotated = rotate(x, signs)
        self._last = (weakref.ref(x, self._forget), state, rotated)
        return rotated

    def _forget(self, dead: weakref.ref[Tensor]) -> None:
        last = self._last
        if last is not None and last[0] is dead:
            self._last = None

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, _: dict[str, Any]) -> None:
        self._last = None


def rotate(x: Tensor, signs: Tensor) -> Tensor:
    """`rotate_input`, or the compiled kernel where possible; the kernel has no gradient."""
    inference = not (torch.is_grad_enabled() and x.requires_grad)
    if x.device.type == "cpu" and x.dtype != torch.float64 and inference and has_kernels():
        return ops.rotate(x, signs)
    return rotate_input(x, signs)


def share_rotations(model: nn.Module) -> None:
    """Let the rotated linears of a module that have the same signs share their rotated input.

    A linear whose signs no other has rotates within its kernel.
    """
    for module in model.modules():
        siblings = [child for child in module.children() if isinstance(child, PackedLinear) and child.layout.rotation]
        _share(siblings)


def _share(layers: Iterable[PackedLinear]) -> None:
    groups: dict[tuple[torch.device, bytes], list[PackedLinear]] = {}
    for layer in layers:
        stored = layer.get_parameter("weight_signs")
        if not stored.is_meta:
            groups.setdefault((stored.device, stored.detach().cpu().numpy().tobytes()), []).append(layer)
    for group in groups.values():
        if len(group) > 1:
            shared = SharedRotation()
            for layer in group:
                layer.rotate = shared
