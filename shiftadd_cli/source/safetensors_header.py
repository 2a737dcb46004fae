"""Reads and checks the header of one safetensors file without touching its tensors."""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path
from typing import Any

from shiftadd_cli.errors import SourceError
from shiftadd_cli.source.checkpoint import TensorHeader
from shiftadd_cli.storage.safetensors_names import DTYPES

# The limit of the format, see https://github.com/huggingface/safetensors (format).
_MAX_HEADER = 100_000_000
_GIT_LFS = b"version https://git-lfs"


def read_header(path: Path) -> tuple[dict[str, TensorHeader], bytes]:
    """Tensor headers of `path` by name, and the stored bytes of the header.

    Raises:
        SourceError: the file is not safetensors, is shorter or longer than its header says, or the header is damaged.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(_GIT_LFS))
        if start == _GIT_LFS:
            raise SourceError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder.")
        if len(start) < 8:
            raise _damaged(path, f"it holds {size} bytes, too few for a header")
        (length,) = struct.unpack("<Q", start[:8])
        if length > min(_MAX_HEADER, size - 8):
            raise _damaged(path, f"its header claims {length} bytes, the file holds {size}")
        file.seek(8)
        raw = file.read(length)
    try:
        entries = json.loads(raw)
    except (ValueError, RecursionError) as error:  # JSON and Unicode errors both derive from ValueError
        raise _damaged(path, f"its header is not valid JSON ({error})") from error
    if not isinstance(entries, dict):
        raise _damaged(path, "its header is not a table of tensors")
    entries.pop("__metadata__", None)
    return _check(path, entries, size - 8 - length), raw


def _check(path: Path, entries: dict[str, Any], data_bytes: int) -> dict[str, TensorHeader]:
    headers: dict[str, TensorHeader] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in entries.items():
        try:
            kind, shape = str(entry["dtype"]), tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            are_counts = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
        except (TypeError, KeyError, ValueError) as error:
            raise _damaged(path, f"the entry of tensor {name} is not complete") from error
        if not are_counts:
            raise _damaged(path, f"tensor {name} has a shape or offsets that are not counts")
        if kind not in DTYPES:
            raise SourceError(
                f"Tensor {name} in {path} is stored as {kind}, which is not supported; "
                "convert the checkpoint to float32, float16 or bfloat16."
            )
        if end - begin != prod(shape) * DTYPES[kind].itemsize:
            raise _damaged(path, f"tensor {name} of shape {list(shape)} ({kind}) is given {end - begin} bytes")
        headers[name] = TensorHeader(shape, DTYPES[kind], end - begin)
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise _damaged(path, f"tensor {name} does not start where the one before it ends")
        position = end
    if position > data_bytes:
        raise _damaged(path, f"it is cut off: {position} bytes of tensors are declared, {data_bytes} are there")
    if position < data_bytes:
        raise _damaged(path, f"{data_bytes - position} bytes follow the last tensor")
    return headers


def _damaged(path: Path, what: str) -> SourceError:
    return SourceError(f"{path} is damaged: {what}; download or copy the file again.")
