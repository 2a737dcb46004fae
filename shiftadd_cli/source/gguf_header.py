"""Reading and checking the header of a GGUF file without touching its tensors."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from shiftadd_cli.errors import SourceError

_PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies: `offset` and `nbytes` in the file, `shape` in torch order, `kind` its ggml type."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int
    nbytes: int

    @property
    def dtype(self) -> torch.dtype | None:
        """None for quantized blocks."""
        return _PLAIN.get(self.kind)


@dataclass(frozen=True)
class GgufFile:
    """A checked header. `metadata` has arrays of strings as their lengths; `raw` is the header as stored."""

    path: Path
    architecture: str
    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]
    raw: bytes

    @property
    def stored_dtype(self) -> torch.dtype | None:
        """The float type the model was written in; None if any tensor is quantized, since then it has none."""
        dtypes = {tensor.dtype for tensor in self.tensors}
        if None in dtypes:
            return None
        # Norms stay in float32 beside half weights, so the half type is the model's.
        return next((half for half in (torch.bfloat16, torch.float16) if half in dtypes), torch.float32)


def read_gguf_header(path: Path) -> GgufFile:
    """Header of a GGUF file, offsets checked against the size of the file.

    Raises:
        SourceError: not a GGUF file, damaged, cut off, or with tensor types that cannot be decoded.
    """
    from gguf.constants import GGML_QUANT_SIZES
    from transformers.integrations.gguf import reader

    size = path.stat().st_size
    if size < 24:
        raise _damaged(path, f"it holds {size} bytes, too few for a header")
    try:
        blob = reader._mapped(str(path))
        metadata, count, position = reader._read_metadata(blob, str(path))
        entries, end = reader._read_tensor_table(blob, count, position)
    except (ValueError, struct.error, IndexError, OverflowError, MemoryError, UnicodeDecodeError) as error:
        raise _damaged(path, f"its header cannot be read ({str(error).rstrip('.')})") from error
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if end > size or not isinstance(alignment, int) or alignment <= 0:
        raise _damaged(path, "its header is cut off")
    start = -(-end // alignment) * alignment
    sizes = {int(kind): pair for kind, pair in GGML_QUANT_SIZES.items()}
    tensors = []
    for name, shape, kind, offset in entries:
        if kind not in sizes:
            raise SourceError(
                f"Tensor {name} in {path} has the GGUF type {kind}, which cannot be decoded; use another "
                "quantization of the model, or better its original weights."
            )
        per_block, block_bytes = sizes[kind]
        nbytes = prod(shape) // per_block * block_bytes
        if start + offset + nbytes > size:
            raise _damaged(path, f"it is cut off: tensor {name} ends at byte {start + offset + nbytes} of {size}")
        tensors.append(GgufTensor(name, tuple(shape), kind, start + offset, nbytes))
    return GgufFile(path, metadata["general.architecture"], metadata, tuple(tensors), bytes(blob[:end]))


def _damaged(path: Path, what: str) -> SourceError:
    return SourceError(f"{path} is damaged: {what}; download or copy the file again.")
