"""Safetensors files: planning shards from tensor shapes alone, and reading headers.

A file holds 8 bytes of little-endian header length, a JSON header padded with spaces to a multiple of 8, and the
tensors' bytes without gaps. Since all shapes are known in advance, it can be written tensor by tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from shiftadd_cli.errors import ArtifactError
from shiftadd_cli.storage.safetensors_names import DTYPES, SINGLE_FILE

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH_BYTES = 8


TensorShape = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file to be written; `start` and `stop` are byte positions in the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    stop: int


@dataclass(frozen=True)
class Shard:
    """One file to be written: its name, the bytes before the tensors, and the position of each tensor."""

    name: str
    header: bytes
    entries: Mapping[str, TensorEntry]

    @property
    def nbytes(self) -> int:
        return max((entry.stop for entry in self.entries.values()), default=len(self.header))


def plan_shards(tensors: Mapping[str, TensorShape], shard_bytes: int) -> list[Shard]:
    """Distribute tensors, in the given order, over files with at most `shard_bytes` of tensors each.

    A larger tensor gets a file of its own. There is always at least one file. Names follow transformers.
    """
    parts: list[dict[str, TensorShape]] = [{}]
    filled = 0
    for name, (shape, dtype) in tensors.items():
        size = nbytes((shape, dtype))
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
        stop = position + nbytes((shape, dtype))
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


def read_header(path: Path) -> dict[str, TensorShape]:
    """Shapes and dtypes of the tensors in a safetensors file, from its header alone.

    Raises ArtifactError, naming the file, if it is missing, truncated or malformed.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: _shape(path, name, file.get_slice(name)) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as failure:
        raise ArtifactError(f"{path} is missing; copy the checkpoint again.") from failure
    except (OSError, SafetensorError) as failure:
        reason = " ".join(str(failure).split()) or type(failure).__name__
        raise ArtifactError(f"{path} is truncated or damaged ({reason}); copy it again.") from failure


def nbytes(shape: TensorShape) -> int:
    """Bytes of a tensor."""
    return math.prod(shape[0]) * shape[1].itemsize


def _shape(path: Path, name: str, tensor: Any) -> TensorShape:
    kind = tensor.get_dtype()
    if kind not in DTYPES:
        raise ArtifactError(f"{name} in {path} is stored as {kind}, which this shiftadd does not know; upgrade it.")
    return tuple(tensor.get_shape()), DTYPES[kind]
