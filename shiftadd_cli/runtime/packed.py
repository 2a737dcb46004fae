"""The base class of modules over a compressed matrix: its stored tensors, and their form for the kernels."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shiftadd_cli.bcq.weight import PackedLayout, QuantizedWeight
from shiftadd_cli.kernels import triton_weight
from shiftadd_cli.kernels.cpu_weight import CpuWeight
from shiftadd_cli.kernels.select import Kernel, Precision, chosen_precision, suited_kernel
from shiftadd_cli.kernels.triton_weight import TritonWeight
from shiftadd_cli.runtime.stored import StoredWeight

_CODES = "weight_codes"


class PackedWeight(StoredWeight):
    """A module whose weight is a compressed matrix.

    The stored tensors are frozen parameters named as in `bcq.weight`. After `prepare`, the module computes with the
    kernels that suit its device; before that it decodes on every call. Modules with tied weights are `tie`d and then
    share one prepared form.
    """

    layout: PackedLayout
    # Buffers of a prepared module, see `kernels.cpu_weight`.
    words: Tensor
    scale_codes: Tensor | None
    scales: Tensor | None
    offsets: Tensor | None
    row_scale: Tensor
    signs: Tensor | None

    kernel: Kernel | None
    precision: Precision
    _arranged: CpuWeight | None
    _on_gpu: TritonWeight | None
    _rotation: Tensor | None
    _tied: tuple[PackedWeight, ...]
    _last_saved: weakref.ref[Tensor] | None

    def _hold(
        self,
        layout: PackedLayout,
        shape: tuple[int, ...],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Start to hold a matrix of zeros. shape: of `weight`; dtype: of `weight`, the default dtype if None."""
        self.layout = layout
        self.precision = Precision.AUTO
        self.kernel = self._arranged = self._on_gpu = self._rotation = self._last_saved = None
        # In a tuple, so that they do not become submodules.
        self._tied = ()
        self._stand_for(tuple(layout.tensors()), shape, dtype)
        for suffix, (size, kind) in layout.tensors().items():
            empty = torch.zeros(size, dtype=kind, device=device)
            self.register_parameter(suffix, nn.Parameter(empty, requires_grad=False))

    def _let_go(self) -> None:
        self.untie()
        super()._let_go()
        del self.layout, self.precision, self.kernel, self._arranged, self._on_gpu, self._rotation
        del self._tied, self._last_saved

    def packed(self) -> QuantizedWeight:
        """The compressed matrix; shares memory with the parameters, except for planes that `prepare` rearranged."""
        tensors = self._tensors()
        if self.kernel is Kernel.CPU:
            tensors[_CODES] = self.on_cpu().codes(self.layout)
        return QuantizedWeight(self.layout, tensors)

    def decode(self) -> Tensor:
        """The decoded weight, float32 in its own shape."""
        return self.packed().decode().view(self._shape)

    def _tensors(self) -> dict[str, Tensor]:
        """The stored tensors by suffix, where codes may be empty."""
        return {name: self.get_parameter(name).detach() for name in self.layout.tensors()}

    def tie(self, other: PackedWeight) -> None:
        """Share parameters and prepared form with `other`, which has the same layout, from now on."""
        self.restore()
        other.restore()
        group = list(dict.fromkeys((self, *self._tied, other, *other._tied)))
        for member in group:
            for name in self.layout.tensors():
                setattr(member, name, self.get_parameter(name))
            member._tied = tuple(twin for twin in group if twin is not member)

    def untie(self) -> None:
        """Share nothing from now on; parameters stay the same objects."""
        self.restore()
        for twin in self._tied:
            twin._tied = tuple(member for member in twin._tied if member is not self)
        self._tied = ()

    def prepare(self) -> None:
        """Choose the kernels that suit the module's device and arrange its tensors for them, see `kernels.select`.

        For the CPU kernels the planes are rearranged and the stored ones dropped: their parameter is empty afterwards,
        but state dicts still contain them. A module that moves to another device is prepared again.
        """
        self.restore()
        weight, kernel = self.packed(), suited_kernel(self.layout, self._device)
        arranged = CpuWeight.pack(weight) if kernel is Kernel.CPU else None
        on_gpu = triton_weight.prepare(weight) if kernel is Kernel.TRITON else None
        rotation = weight.signs() if kernel is Kernel.TRITON else None
        if arranged is not None:
            self.get_parameter(_CODES).data = torch.empty(0, dtype=torch.uint8)
        for member in self._group():
            member.kernel, member.precision = kernel, chosen_precision()
            member._arranged, member._on_gpu, member._rotation = arranged, on_gpu, rotation
            if arranged is not None:
                for name, tensor in arranged.tensors().items():
                    member.register_buffer(name, tensor, persistent=False)

    def restore(self) -> None:
        """Undo `prepare`."""
        if self.kernel is Kernel.CPU:
            arranged = self.on_cpu()
            self.get_parameter(_CODES).data = arranged.codes(self.layout)
            for member in self._group():
                for name in arranged.tensors():
                    delattr(member, name)
        for member in self._group():
            member.kernel = member._arranged = member._on_gpu = member._rotation = None

    def _group(self) -> list[PackedWeight]:
        """This module and those that still share its parameters: one that moved to another device has its own."""
        codes = self.get_parameter(_CODES)
        return [self, *(twin for twin in self._tied if twin.get_parameter(_CODES) is codes)]

    def on_cpu(self) -> CpuWeight:
        """The tensors of a module prepared for the CPU kernels."""
        # A compiler tracks a module's buffers but not its other attributes.
        if self._arranged is not None and not torch.compiler.is_compiling():
            return self._arranged
        return CpuWeight(self.words, self.scale_codes, self.scales, self.offsets, self.row_scale, self.signs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        with self._restored():
            super()._apply(fn, recurse)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.kernel is not Kernel.CPU:
            return
        # One tensor for all names of a tied weight, so that it is saved once.
        codes = next((value for value in destination.values() if value is self._saved), None)
        if codes is None:
            codes = self.on_cpu().codes(self.layout)
        destination[prefix + _CODES] = codes
        for member in self._group():
            member._last_saved = weakref.ref(codes)

    @property
    def _saved(self) -> Tensor | None:
        """The codes in the last state dict of this module or a tied one, while that exists."""
        return None if self._last_saved is None else self._last_saved()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last_saved": None}

    def _load_from_state_dict(self, *arguments: Any) -> None:
        with self._restored():
            super()._load_from_state_dict(*arguments)

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Restore the stored tensors for the duration, and prepare the module again afterwards if it was prepared."""
        prepared = self.kernel is not None
        self.restore()
        yield
        if prepared:
            self.prepare()

    def extra_repr(self) -> str:
        layout = self.layout
        return (
            f"primitive={layout.format.primitive}, bits={layout.bits}, scale_format={layout.scales.scale_format}, "
            f"rotation={layout.rotation}"
        )
