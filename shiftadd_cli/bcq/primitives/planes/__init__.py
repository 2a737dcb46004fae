"""Binary planes: every weight is a sum of its group's scales, each with its own sign.

    W[o, i] ≈ row_scale[o] · (Σ_b scale[o, g(i), b] · B_b[o, i]  +  offset[o, g(i)])

Binary-coding quantization, as in LUT-GEMM (arXiv:2206.09557, section 3) and ShiftAddLLM (arXiv:2406.05981, section 4).
Tensors stored next to the codes, with R and C groups along rows and columns and n nibbles per scale of the format:

    weight_exponents  uint8    [R, ceil(C · bits · n / 2)]        scale codes of n nibbles, order (C, bits, n)
    weight_scales     float16  [R, C, bits]                       instead, for the scale format `float`
    weight_row_scale  bfloat16 [out] or [1]                       [1]: one power of two for the whole matrix
    weight_offset     uint8    [R, ceil(C / 2)]                   optional; nibbles, eighths of the largest scale
                      float16  [R, C]                             instead, for the scale format `float`
"""

from __future__ import annotations

from collections import Counter
from typing import ClassVar, Literal

import torch
from torch import Tensor

from shiftadd_cli.bcq.choices import Primitive as PrimitiveName
from shiftadd_cli.bcq.grid import Rows, ScaleGrid
from shiftadd_cli.bcq.hessian import Objective
from shiftadd_cli.bcq.levels import code_levels
from shiftadd_cli.bcq.matrix_format import MatrixFormat
from shiftadd_cli.bcq.options import SolverOptions
from shiftadd_cli.bcq.packing import pack_nibbles, unpack_nibbles, unpack_signs
from shiftadd_cli.bcq.primitives.base import Counts, Primitive, RowDecoder, Scales, Tensors, TensorShapes
from shiftadd_cli.bcq.primitives.planes.problem import PlaneProblem
from shiftadd_cli.bcq.scale_formats import decode_offsets, encode_offsets, offset_multiples, scale_format
from shiftadd_cli.bcq.snap import SnappedScales

TABLE_INPUTS = 4
# 8 of the 16 signed sums of 4 inputs are the negatives of the others. Once a ± b and c ± d are known, each takes one
# addition.
_TABLE_ENTRIES = 8
_TABLE_ADDITIONS = 4 + _TABLE_ENTRIES


class BinaryPlanes(Primitive):
    """Planes of signs times scales of their group."""

    name: PrimitiveName = "bcq"
    format_version = 1
    plan_version: ClassVar[Literal[1, 2, 3]] = 1
    lookup_kernels = True

    def scales(self, form: MatrixFormat, rows: int, columns: int) -> Scales:
        grid = ScaleGrid.resolve(rows, columns, form.group_rows, form.group_size)
        return Scales(grid, form.scale_format, form.row_scale, form.offset)

    def tensors(self, scales: Scales, bits: int) -> TensorShapes:
        grid, nibbles = scales.grid, scale_format(scales.scale_format).nibbles
        rows, groups, planes = grid.row_groups, grid.column_groups, self.planes(bits)
        shapes: TensorShapes = {}
        if nibbles:
            shapes["weight_exponents"] = ((rows, -(-groups * planes * nibbles // 2)), torch.uint8)
        else:
            shapes["weight_scales"] = ((rows, groups, planes), torch.float16)
        shapes["weight_row_scale"] = ((grid.rows if scales.row_scale else 1,), torch.bfloat16)
        if scales.offset and nibbles:
            shapes["weight_offset"] = ((rows, -(-groups // 2)), torch.uint8)
        elif scales.offset:
            shapes["weight_offset"] = ((rows, groups), torch.float16)
        return shapes

    def rows_together(self, form: MatrixFormat) -> int | None:
        return self.stripe if form.group_rows == 1 and form.row_scale else None

    def fits_on_arrival(self, options: SolverOptions) -> bool:
        return options.sweep == "dynamic"

    def solve(self, weights: Tensor, objective: Objective, options: SolverOptions) -> tuple[Tensor, SnappedScales]:
        return PlaneProblem(weights, objective, options).solve()

    def pack_scales(self, scales: Scales, ratios: Tensor, offsets: Tensor | None) -> dict[str, Tensor]:
        form, tensors = scale_format(scales.scale_format), {}
        if form.nibbles:
            codes = form.encode(ratios).unsqueeze(-1)
            tensors["weight_exponents"] = pack_nibbles(((codes >> _nibble_shifts(form.nibbles, codes)) & 15).flatten(1))
        else:
            tensors["weight_scales"] = ratios.half()
        if offsets is not None and form.nibbles:
            tensors["weight_offset"] = pack_nibbles(encode_offsets(offset_multiples(offsets, ratios)))
        elif offsets is not None:
            tensors["weight_offset"] = offsets.half()
        return tensors

    def ratios(self, scales: Scales, bits: int, tensors: Tensors) -> Tensor:
        form, groups, planes = scale_format(scales.scale_format), scales.grid.column_groups, self.planes(bits)
        if not form.nibbles:
            return tensors["weight_scales"].float()
        fields = unpack_nibbles(tensors["weight_exponents"], groups * planes * form.nibbles).int()
        fields = fields.view(-1, groups, planes, form.nibbles)
        return form.decode((fields << _nibble_shifts(form.nibbles, fields)).sum(-1))

    def offsets(self, scales: Scales, tensors: Tensors, ratios: Tensor) -> Tensor | None:
        stored = tensors.get("weight_offset")
        if stored is None:
            return None
        if stored.dtype == torch.float16:
            return stored.float()
        return decode_offsets(unpack_nibbles(stored, scales.grid.column_groups)) * ratios.amax(-1)

    def levels(self, bits: int, ratios: Tensor | None, offsets: Tensor | None) -> Tensor:
        assert ratios is not None, "planes have scales"
        return code_levels(ratios, offsets)

    def decoder(self, scales: Scales, bits: int, tensors: Tensors) -> RowDecoder:
        grid, ratios = scales.grid, self.ratios(scales, bits, tensors)
        offsets = self.offsets(scales, tensors, ratios)
        by_plane = ratios.permute(2, 0, 1).contiguous()

        def decode(rows: Rows, out: Tensor) -> None:
            planes = self.packed_planes(tensors["weight_codes"], rows, bits)
            for plane, plane_scales in enumerate(by_plane):
                signs = unpack_signs(planes[:, plane], grid.columns)
                _add_products(out, signs, grid.select_rows(plane_scales, rows), grid.group_columns)
            if offsets is not None:
                out += grid.expand_columns(grid.select_rows(offsets, rows))

        return decode

    def operations(self, scales: Scales, bits: int, *, tables: bool) -> Counts:
        grid, bits = scales.grid, self.planes(bits)
        rows, columns = grid.rows, grid.columns
        counts: Counts = Counter()
        # Scales multiply the sums of groups or, if many rows share them, the inputs.
        inputs_are_scaled = grid.row_groups * columns < rows * grid.column_groups
        scaled = bits * (grid.row_groups * columns if inputs_are_scaled else rows * grid.column_groups)
        counts.update(_scaling(scales.scale_format, scaled))
        if tables:
            width = columns if inputs_are_scaled else grid.group_columns
            quads = -(-width // TABLE_INPUTS) * (1 if inputs_are_scaled else grid.column_groups)
            tables_built = quads * (bits * grid.row_groups if inputs_are_scaled else 1)
            lookups = rows * bits * quads
            counts.update(
                fp32_add=tables_built * _TABLE_ADDITIONS + lookups, sram_16_bits=tables_built * _TABLE_ENTRIES + lookups
            )
        else:
            counts.update(fp32_add=rows * columns * bits)
        if scales.offset:
            # A small integer times the sum of a group's inputs, which all rows share, and then a scale.
            offsets = rows * grid.column_groups
            counts.update(fp32_add=columns, fp16_multiply=offsets)
            counts.update(_scaling(scales.scale_format, offsets))
        return counts

    def words(self, scales: Scales) -> tuple[str, ...]:
        return scales.scale_format, f"{scales.grid.group_rows} x {scales.grid.group_columns}"


def _nibble_shifts(nibbles: int, codes: Tensor) -> Tensor:
    return 4 * torch.arange(nibbles, dtype=torch.int32, device=codes.device)


def _add_products(out: Tensor, signs: Tensor, scales: Tensor, width: int) -> None:
    """Compute `out += signs · scales`, where `scales` `[rows, C]` has one number for every `width` columns."""
    full = out.shape[1] // width * width
    # Broadcasting over views of full groups avoids repeating the scales for every column.
    groups = out[:, :full].unflatten(1, (-1, width))
    groups.addcmul_(signs[:, :full].unflatten(1, (-1, width)), scales[:, : full // width, None])
    if full < out.shape[1]:
        out[:, full:].addcmul_(signs[:, full:], scales[:, -1:])


def _scaling(name: str, times: int) -> Counts:
    """Operations to scale and add up `times` numbers: a scale is a sum of shifts, or a float."""
    terms = scale_format(name).nibbles
    counts: Counts = Counter()
    if terms:
        counts.update(shift=terms * times, fp32_add=terms * times)
    else:
        counts.update(fp16_multiply=times, fp32_add=times)
    return counts
