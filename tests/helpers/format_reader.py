"""A reader of compressed checkpoints written from docs/format.md alone, with numpy and the standard library.

It shows that the page is complete. If the reader lacks information, fix the page first.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_TYPES = {"U8": "<u1", "I8": "<i1", "I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4", "BF16": "<u2"}

_MAGNITUDES = {
    ("shift1", 2): [1, 4],
    ("shift1", 3): [1, 4, 8, 16],
    ("shift1", 4): [0, 1, 2, 4, 8, 16, 32, 64],
    ("shift2", 2): [6, 20],
    ("shift2", 3): [10, 33, 60, 96],
    ("shift2", 4): [5, 16, 28, 40, 56, 72, 96, 128],
    ("shift2", 5): [2, 6, 10, 15, 20, 24, 28, 34, 40, 48, 56, 63, 72, 80, 96, 128],
}
_UNITS = {"shift1": {2: 4, 3: 16, 4: 64}, "shift2": {2: 16, 3: 64, 4: 128, 5: 128}}


_TRELLISES = {
    ("trellis1", 1): [0x22, 0x75],
    ("trellis1", 2): [0xC1, 0x34, 0x62],
    ("trellis1", 3): [0x20, 0x84, 0x111, 0x4E],
    ("trellis1", 4): [0x122, 0x25, 0x261, 0x21C, 0xC4],
    ("trellis2", 2): [0x61, 0x4, 0x59, 0x82],
    ("trellis2", 3): [0x20, 0x10E, 0x88, 0x119, 0x45],
}
_STRIPE, _STATE_BITS = 256, 6


class Reader:
    """A checkpoint folder: `modules` and `tables` by name, and every stored tensor."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        if config["quant_method"] != "shiftadd" or config["format_version"] not in (1, 2, 3, 4, 5, 6):
            raise ValueError("not a checkpoint that this reader knows")
        common = {"primitive": "bcq", "rotation": "none", "outlier_columns": 0.0} | config
        self.modules: dict[str, dict[str, Any]] = {
            name: common | entry for name, entry in config.pop("modules").items()
        }
        self.tables: dict[str, dict[str, Any]] = config.get("tables", {})
        # A compressed matrix has the keys of a module; that of a convolution has a column for each number of a kernel.
        self._matrices = self.modules | {
            name: common | entry | {"shape": [entry["shape"][0], math.prod(entry["shape"][1:])]}
            for name, entry in self.tables.items()
            if "bits" in entry
        }
        index = folder / "model.safetensors.index.json"
        files = ["model.safetensors"]
        if index.exists():
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        self.tensors: dict[str, Array] = {}
        for file in files:
            self.tensors |= _read_safetensors(folder / file)

    def planes(self, name: str) -> Array:
        """W′: float32 `[out, in]`."""
        form, stored = self._matrices[name], self._stored(name)
        rows, columns = form["shape"]
        bits = _unpack_bits(stored["weight_codes"], columns)
        row_scale = stored["weight_row_scale"]
        if form["primitive"] in ("shift1", "shift2"):
            return (_shifts(form, bits) * row_scale[:, None]).astype(np.float32)
        width = columns if form["group_size"] == "all" else min(form["group_size"], columns)
        height = _group_height(form["group_rows"], rows)
        groups = -(-columns // width)
        if form["primitive"] != "bcq":
            bits = _trellis_planes(form, bits)
        scales, offsets = _scales(form, stored, groups, bits.shape[1])
        row, column = np.arange(rows) // height, np.arange(columns) // width
        total = np.zeros((rows, columns), np.float32)
        for plane in range(bits.shape[1]):
            signs = np.where(bits[:, plane], np.float32(1), np.float32(-1))
            total += signs * scales[row][:, column, plane]
        if offsets is not None:
            total += offsets[row][:, column]
        return total * (row_scale[:, None] if len(row_scale) > 1 else row_scale[0])

    def matrix(self, name: str) -> Array:
        """W, which multiplies the original input: float64 `[out, in]` with a rotation, float32 without."""
        weight, stored = self.planes(name), self._stored(name)
        if self._matrices[name]["rotation"] == "hadamard":
            weight = _times_rotation(weight.astype(np.float64), stored["weight_signs"])
        if self._matrices[name]["outlier_columns"] > 0:
            weight[:, stored["weight_column_ids"]] += stored["weight_columns"]
        return weight

    def table(self, name: str) -> Array:
        """An embedding, output head or patch embedding `[rows, ...]`: float32, or like `matrix`."""
        if name in self._matrices:
            return self.matrix(name).reshape(self.tables[name]["shape"])
        stored = self._stored(name)
        codes = stored["weight_int8"].astype(np.float32)
        return codes * stored["weight_int8_scale"].reshape(-1, *[1] * (codes.ndim - 1))

    def _stored(self, name: str) -> dict[str, Array]:
        prefix = f"{name}."
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}


def _read_safetensors(path: Path) -> dict[str, Array]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        values = np.frombuffer(data[start:stop], _TYPES[entry["dtype"]]).reshape(entry["shape"])
        if entry["dtype"] == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = values
    return tensors


def _unpack_bits(packed: Array, columns: int) -> Array:
    return np.unpackbits(packed, axis=-1, bitorder="little")[..., :columns]


def _unpack_nibbles(packed: Array, count: int) -> Array:
    pairs = np.stack([packed & 15, packed >> 4], axis=-1)
    return pairs.reshape(*packed.shape[:-1], -1)[..., :count].astype(int)


def _group_height(group_rows: int | str, rows: int) -> int:
    if group_rows == "all":
        return rows
    if isinstance(group_rows, str):
        return -(-rows // int(group_rows.removeprefix("1/")))
    return min(group_rows, rows)


def _trellis_planes(form: dict[str, Any], stored: Array) -> Array:
    """Computed planes `[out, m, in]` of stored bits `[out, bits, in]`."""
    rows, bits, columns = stored.shape
    masks = _TRELLISES[form["primitive"], bits]
    planes = np.zeros((rows, len(masks), columns), int)
    for row in range(rows):
        for plane, mask in enumerate(masks):
            for place in range(_STATE_BITS + bits):
                above, bit = divmod(place, bits)
                if mask >> place & 1 and row % _STRIPE >= above:
                    planes[row, plane] ^= stored[row - above, bit]
    return planes


def _scales(form: dict[str, Any], stored: dict[str, Array], groups: int, bits: int) -> tuple[Array, Array | None]:
    """Scales float32 `[R, C, bits]` of `bits` planes and offsets `[R, C]`, relative to the row scale."""
    if form["scale_format"] == "float":
        offsets = stored["weight_offset"].astype(np.float32) if form["offset"] else None
        return stored["weight_scales"].astype(np.float32), offsets
    fields = {"pot": 1, "apot2": 2, "apot3": 3}[form["scale_format"]]
    nibbles = _unpack_nibbles(stored["weight_exponents"], groups * bits * fields).reshape(-1, groups, bits, fields)
    exponent = nibbles[..., 0]
    scales = 2.0**-exponent
    for term in np.moveaxis(nibbles, -1, 0)[1:]:
        distance = term & 7
        exponent = exponent + distance
        scales += np.where(distance > 0, np.where(term & 8, -1, 1) * 2.0**-exponent, 0)
    scales = np.where(nibbles[..., 0] == 15, 0, scales).astype(np.float32)
    if not form["offset"]:
        return scales, None
    eighths = _unpack_nibbles(stored["weight_offset"], groups)
    eighths = np.where(eighths > 7, eighths - 16, eighths)
    return scales, (eighths / 8 * scales.max(-1)).astype(np.float32)


def _shifts(form: dict[str, Any], bits: Array) -> Array:
    """Levels `[out, in]` of the codes whose bits are `[out, bits, in]`."""
    magnitudes = np.array(_MAGNITUDES[form["primitive"], form["bits"]]) / _UNITS[form["primitive"]][form["bits"]]
    *low, sign = np.moveaxis(bits, 1, 0).astype(int)
    index = sum((bit << position for position, bit in enumerate(low)), np.zeros_like(sign))
    return np.where(sign, 1, -1) * magnitudes[index]


def _times_rotation(weight: Array, packed_signs: Array) -> Array:
    """W′ R."""
    columns = weight.shape[1]
    n = columns & -columns
    ones = np.array([[bin(a & b).count("1") for b in range(n)] for a in range(n)])
    hadamard = np.where(ones % 2, -1.0, 1.0)
    k = (n.bit_length() - 1) // 2
    signs = np.where(_unpack_bits(packed_signs, columns), 1.0, -1.0)
    return (weight.reshape(-1, n) @ hadamard).reshape(weight.shape) * 2.0**-k * signs
