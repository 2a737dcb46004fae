"""Safetensors files: laying tensors out over shards from their shapes alone, and reading headers strictly.

The container is 8 bytes of little-endian header length, a JSON header padded with spaces to a multiple of 8, and the
tensors' bytes without gaps. Knowing all shapes beforehand, a file can be written tensor by tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shiftadd_cli.errors import ArtifactError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LENGTH_BYTES = 8
# The limit of the safetensors library itself.
_LARGEST_HEADER = 100_000_000

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

TensorShape = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file; `start` and `stop` are byte positions in the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Shard:
    """One file to be written: its name, the bytes before the tensors, and where each tensor goes."""

    name: str
    header: bytes
    entries: Mapping[str, TensorEntry]

    @property
    def nbytes(self) -> int:
        return max((entry.stop for entry in self.entries.values()), default=len(self.header))


def plan_shards(tensors: Mapping[str, TensorShape], shard_bytes: int) -> list[Shard]:
    """Distribute tensors, in the order given, over files of at most `shard_bytes` of tensors each.

    A single tensor larger than that gets a file of its own. At least one file results. Names follow transformers.
    """
    parts: list[dict[str, TensorShape]] = [{}]
    filled = 0
    for name, (shape, dtype) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        if parts[-1] and filled + size > shard_bytes:
            parts.append({})
            filled = 0
        parts[-1][name] = (shape, dtype)
        filled += size
    if len(parts) == 1:
        return [_lay_out(SINGLE_FILE, parts[0])]
    return [_lay_out(f"model-{i:05d}-of-{len(parts):05d}.safetensors", part) for i, part in enumerate(parts, 1)]


def _lay_out(file: str, tensors: Mapping[str, TensorShape]) -> Shard:
    # Readers view the bytes in place, so every tensor must start at a multiple of its item size: large items first.
    order = sorted(tensors, key=lambda name: -tensors[name][1].itemsize)
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in order:
        shape, dtype = tensors[name]
        stop = position + math.prod(shape) * dtype.itemsize
        fields[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    entries = {}
    for name in order:
        start, stop = fields[name]["data_offsets"]
        entries[name] = TensorEntry(*tensors[name], len(header) + start, len(header) + stop)
    return Shard(file, header, entries)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file, in file order, from its header alone.

    Raises ArtifactError, naming the file and where possible the tensor, if the file is truncated or malformed.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, _LARGEST_HEADER):
                raise ArtifactError(f"{path} is damaged: its header does not fit into the file; copy it again.")
            fields = json.loads(file.read(length))
    except OSError as failure:
        raise ArtifactError(f"{path} cannot be read ({failure.strerror}); copy it again.") from failure
    except ValueError as failure:
        raise ArtifactError(f"{path} is damaged: its header is not JSON; copy it again.") from failure
    if not isinstance(fields, dict):
        raise ArtifactError(f"{path} is damaged: its header is not a table of tensors; copy it again.")
    fields.pop("__metadata__", None)
    base = _LENGTH_BYTES + length
    entries = {name: _entry(path, name, field, base) for name, field in fields.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    position = base
    for name, entry in ordered.items():
        if entry.start != position:
            raise ArtifactError(f"{path} is damaged: {name} does not follow the tensor before it; copy it again.")
        if entry.stop > size:
            raise ArtifactError(f"{path} is truncated: {name} reaches beyond its end; copy it again.")
        position = entry.stop
    if position != size:
        raise ArtifactError(f"{path} is damaged: {size - position} bytes follow the last tensor; copy it again.")
    return ordered


def _entry(path: Path, name: str, field: Any, base: int) -> TensorEntry:
    try:
        dtype = _DTYPES[field["dtype"]]
        shape = tuple(int(side) for side in field["shape"])
        start, stop = (base + int(at) for at in field["data_offsets"])
    except (KeyError, TypeError, ValueError) as failure:
        raise ArtifactError(f"{path} is damaged: the entry of {name} cannot be read; copy it again.") from failure
    if min(shape, default=0) < 0 or stop - start != math.prod(shape) * dtype.itemsize:
        raise ArtifactError(f"{path} is damaged: the size of {name} does not match its shape; copy it again.")
    return TensorEntry(shape, dtype, start, stop)
