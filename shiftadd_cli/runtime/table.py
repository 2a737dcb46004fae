"""Embeddings, heads (output heads and classifiers) and patch embeddings over 8-bit rows or over a compressed matrix."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from shiftadd_cli.bcq.int8 import CODES, SCALE, SUFFIXES, decode_table, table_tensors
from shiftadd_cli.bcq.rotation import rotate_input
from shiftadd_cli.bcq.table_layout import TableLayout
from shiftadd_cli.bcq.weight import QuantizedWeight
from shiftadd_cli.kernels.ops import codes_linear, gather_rows
from shiftadd_cli.kernels.select import Kernel
from shiftadd_cli.native.extension import has_kernels
from shiftadd_cli.runtime.linear import TILE_BYTES, PackedLinear
from shiftadd_cli.runtime.made_class import Reduced, reduce_made
from shiftadd_cli.runtime.packed import PackedWeight
from shiftadd_cli.runtime.stored import StoredWeight

_MARK = "weight_dtype"

# Activation rows, by dtype, up to which our kernel on codes is faster than torch on decoded rows; on a processor with
# AVX-512 and bfloat16 (49,152 x 576, bfloat16, two threads: 1.4 ms against 4.5 at one row, 6 against 8 at 16).
_ROWS_OF_CODES = {torch.bfloat16: 16, torch.float32: 32, torch.float16: 64}


class Table(StoredWeight):
    """A module whose weight is stored as a `TableLayout` says.

    `hold_table` makes it from a dense module, in place. Its class is a subclass of that module's class, so code that
    checks for that class (or uses the buffers, hooks and children of such a class) finds it unchanged.
    """

    dense_class: ClassVar[type[nn.Module]]

    def decode(self) -> Tensor:
        """The decoded weight: float32 `[rows, columns]`, or the kernels of a convolution."""
        raise NotImplementedError

    def connect(self, source: Table) -> None:
        """Read the weight of `source`, which has the same layout, from now on."""
        raise NotImplementedError

    def show_dtype(self) -> None:
        """Register an empty parameter of the module's dtype, before all others, which is in no state dict.

        transformers takes a model's dtype from its first floating-point parameter, which would otherwise be a scale. An
        offloaded module gets none, because accelerate would look for it on disk.
        """
        if getattr(self, self._stored[0]).is_meta:
            return
        mark = nn.Parameter(torch.empty(0, dtype=self._dtype, device=self._device), False)
        self._parameters = {_MARK: mark, **self._parameters}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(prefix + _MARK, None)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        missing[:] = [name for name in missing if name != prefix + _MARK]


class Int8Table(Table):
    """A module over 8-bit rows, see `bcq.int8`: the frozen parameter `weight_int8` and the buffer `weight_int8_scale`.

    The scale is a buffer because the scale of an input embedding would come first among the parameters of a model (see
    `show_dtype`). The scale of a tied module is in no state dict.
    """

    weight_int8: nn.Parameter
    weight_int8_scale: Tensor

    def decode(self) -> Tensor:
        return decode_table(self.weight_int8.detach(), self.weight_int8_scale)

    def connect(self, source: Table) -> None:
        """Read the rows of `source` from now on; only `source` saves the scale. Tensors on another device (or on disk)
        stay there."""
        assert isinstance(source, Int8Table), "tied modules have the same layout"
        if self._device == source._device:
            self.weight_int8 = source.weight_int8
        self.register_buffer(SCALE, source.weight_int8_scale.to(self.weight_int8_scale.device), persistent=False)

    def __reduce_ex__(self, _: Any) -> Reduced:
        return reduce_made(_int8_class, self)


class Int8Embedding(Int8Table, nn.Embedding):  # type: ignore[override]  # `weight` is a property here
    """Looks up the rows `code · scale`, computed in float32 and rounded once to the module's dtype."""

    dense_class = nn.Embedding

    def forward(self, input: Tensor) -> Tensor:
        """`[...]` of integers → `[..., columns]`."""
        return decode_table(embedding(input, self.weight_int8), self.weight_int8_scale[input], self._dtype)


class Int8Linear(Int8Table, nn.Linear):  # type: ignore[override]  # `weight` is a property here
    """`(x @ codes.T) * scale + bias`: the codes are exact in every dtype, so only the product is rounded."""

    dense_class = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """`[..., columns]` → `[..., rows]` in the dtype of `input` (float32, bfloat16, float16 or float64)."""
        if self._few(input):
            return self._multiply_codes(input)
        # Sums of codes overflow float16 long before sums of weights do; these shifts are exact.
        shift = 128 if input.dtype == torch.float16 else 1
        scale = (self.weight_int8_scale.float() * shift).to(input.dtype)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        height = max(1, TILE_BYTES // (input.element_size() * self.in_features))
        tiles = []
        for rows in (slice(start, start + height) for start in range(0, self.out_features, height)):
            tile = self.weight_int8[rows].to(input.dtype)
            product = linear(input, tile / shift if shift > 1 else tile)
            scaled = product * scale[rows] if bias is None else torch.addcmul(bias[rows], product, scale[rows])
            tiles.append(scaled)
        return tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=-1)

    def _few(self, input: Tensor) -> bool:
        """Whether the kernel on raw codes, which has no gradient, is available and faster than decoding them."""
        limit = _ROWS_OF_CODES.get(input.dtype, 0) if input.device.type == "cpu" and has_kernels() else 0
        needs_gradient = input.requires_grad and torch.is_grad_enabled()
        return 0 < input.numel() <= limit * self.in_features and not needs_gradient

    def _multiply_codes(self, input: Tensor) -> Tensor:
        product = codes_linear(input.reshape(-1, self.in_features), self.weight_int8, self.weight_int8_scale)
        product = product if self.bias is None else product + self.bias.to(input.dtype)
        return product.view(*input.shape[:-1], self.out_features)


class Int8Conv2d(Int8Table, nn.Conv2d):  # type: ignore[override]  # `weight` is a property here
    """The convolution with kernels `code · scale`, rounded to the module's dtype: few compared with the pixels."""

    dense_class = nn.Conv2d

    def forward(self, input: Tensor) -> Tensor:
        """`[batch, channels, height, width]` → `[batch, rows, ...]`, in the module's dtype."""
        kernels = decode_table(self.weight_int8, self.weight_int8_scale, self._dtype)
        return self._conv_forward(input, kernels, self.bias)


class PackedTable(PackedWeight, Table):
    """A module over a compressed matrix, see `bcq.weight`."""

    def connect(self, source: Table) -> None:
        """Share the parameters of `source` and the form that they are prepared in. Tensors on another device (or on
        disk) stay there."""
        assert isinstance(source, PackedTable), "tied modules have the same layout"
        if self._device == source._device:
            source.tie(self)

    def __reduce_ex__(self, _: Any) -> Reduced:
        return reduce_made(_packed_class, self)


class PackedEmbedding(PackedTable, nn.Embedding):  # type: ignore[override]  # `weight` is a property here
    """Looks up rows of the decoded matrix, computed in float32 and rounded once to the module's dtype. Only these rows
    are decoded."""

    dense_class = nn.Embedding

    def forward(self, input: Tensor) -> Tensor:
        """`[...]` of integers → `[..., columns]`."""
        if self.kernel is not Kernel.CPU:
            # Negative numbers would count from the end. On a GPU, the test would wait for the device, and a graph that
            # is being captured cannot.
            checked = input.is_cpu and not torch.compiler.is_compiling()
            if checked and bool(((input < 0) | (input >= self.layout.rows)).any()):
                raise IndexError("there is no such row")
            return self.packed().gather(input).to(self._dtype)
        layout = self.layout
        stored = gather_rows(input, self.on_cpu(), layout)
        around = QuantizedWeight(layout, self._tensors())
        decoded = around.completed(stored.view(-1, layout.columns), input.reshape(-1))
        return decoded.view(stored.shape).to(self._dtype)


class PackedHead(PackedTable, PackedLinear, nn.Linear):  # type: ignore[misc, override]  # sizes are properties
    """A `PackedLinear` made from a head."""

    dense_class = nn.Linear

    def _hold(self, *form: Any) -> None:
        super()._hold(*form)
        self.transposed, self.rotate = False, rotate_input

    def _let_go(self) -> None:
        super()._let_go()
        del self.transposed, self.rotate


class PackedConv2d(PackedTable, nn.Conv2d):  # type: ignore[override]  # `weight` is a property here
    """The convolution with the decoded kernels, rounded to the module's dtype: few compared with the pixels."""

    dense_class = nn.Conv2d

    def forward(self, input: Tensor) -> Tensor:
        """`[batch, channels, height, width]` → `[batch, rows, ...]`, in the module's dtype."""
        return self._conv_forward(input, self.decode().to(self._dtype), self.bias)


def can_hold_table(module: nn.Module | None) -> bool:
    """Whether `hold_table` takes the module: an embedding, whatever its forward adds to the lookup, a plain linear, or
    a plain convolution over images.

    An embedding whose forward uses its weight in any other way would compute with NaN, see `StoredWeight.weight`.
    """
    if isinstance(module, nn.Embedding):
        return module.max_norm is None
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in (nn.Linear, nn.Conv2d))


def hold_table(
    module: nn.Embedding | nn.Linear | nn.Conv2d, layout: TableLayout, dtype: torch.dtype | None = None
) -> Table:
    """Turn `module` into a Table in place, with zeros of its size on its device; returns it.

    dtype: of `weight.dtype` from now on; None keeps the present one. A bias stays.
    """
    weight, dtype = module.weight, dtype or module.weight.dtype
    del module.weight
    if layout.packed is not None:
        module.__class__ = _packed_class(type(module))  # type: ignore[assignment]
        assert isinstance(module, PackedTable)
        module._hold(layout.packed, layout.shape, weight.device, dtype)
        return module
    module.__class__ = _int8_class(type(module))  # type: ignore[assignment]
    assert isinstance(module, Int8Table)
    module._stand_for(SUFFIXES, layout.shape, dtype)
    empty = {
        suffix: torch.zeros(shape, dtype=kind, device=weight.device)
        for suffix, (shape, kind) in table_tensors(*layout.shape).items()
    }
    module.register_parameter(CODES, nn.Parameter(empty[CODES], requires_grad=False))
    module.register_buffer(SCALE, empty[SCALE])
    return module


def drop_table(module: Table, weight: nn.Parameter) -> None:
    """Turn a Table back into the module it was made from, in place, with `weight` of the table's shape."""
    module._let_go()
    module._parameters.pop(_MARK, None)
    # accelerate's hooks call the table's forward.
    for name in ("forward", "_old_forward", "_hf_hook"):
        module.__dict__.pop(name, None)
    module.__class__ = module.dense_class  # type: ignore[assignment]
    module.register_parameter("weight", weight)


_INT8: dict[type, type[Table]] = {nn.Embedding: Int8Embedding, nn.Linear: Int8Linear, nn.Conv2d: Int8Conv2d}
_PACKED: dict[type, type[Table]] = {nn.Embedding: PackedEmbedding, nn.Linear: PackedHead, nn.Conv2d: PackedConv2d}


def _int8_class(dense: type[nn.Module]) -> type[Table]:
    return _table_class(dense, _INT8, "Int8")


def _packed_class(dense: type[nn.Module]) -> type[Table]:
    return _table_class(dense, _PACKED, "Packed")


def _table_class(dense: type[nn.Module], classes: dict[type, type[Table]], prefix: str) -> type[Table]:
    if dense not in classes:
        form = next(table for plain, table in classes.items() if issubclass(dense, plain))
        # The table precedes torch's class in the MRO, so that an embedding's `super().forward` finds the table's.
        classes[dense] = type(
            f"{prefix}{dense.__name__}", (dense, form), {"dense_class": dense, "__module__": __name__}
        )
    return classes[dense]
