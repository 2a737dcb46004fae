"""Reads and checks the header of a GGUF file without touching its tensors."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from shiftadd_cli.errors import SourceError

_PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
_DEFAULT_ALIGNMENT = 32


_PART = re.compile(r"(?P<model>.*)-\d{5}-of-(?P<count>\d{5})\.gguf", flags=re.IGNORECASE)
# Other contents of this format in llama.cpp, by general.type or general.architecture.
_NO_MODEL = {
    "imatrix": "an importance matrix",
    "adapter": "an adapter",
    "mmproj": "the projector of a vision-language model",
    "clip": "the projector of a vision-language model",
    "controlvector": "a control vector",
}


@dataclass(frozen=True)
class GgufTensor:
    """Location of one tensor: `offset` and `nbytes` in the file `path`, `shape` in torch order, ggml type `kind`."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int
    nbytes: int
    path: Path

    @property
    def dtype(self) -> torch.dtype | None:
        """The torch dtype; None for quantized blocks."""
        return _PLAIN.get(self.kind)


@dataclass(frozen=True)
class GgufFile:
    """Checked headers of a model in one file or in several parts.

    path: the file, or the first part. metadata: that of the first part, with arrays of strings replaced by their
    lengths. tensors: those of all parts. headers: header bytes by file, in the order of the parts.
    """

    path: Path
    architecture: str
    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]
    headers: dict[Path, bytes]

    @property
    def stored_dtype(self) -> torch.dtype | None:
        """The float dtype that the model was written in; None if any tensor is quantized."""
        dtypes = {tensor.dtype for tensor in self.tensors}
        if None in dtypes:
            return None
        # Norms stay in float32 even with half-precision weights, so the half type is that of the model.
        return next((half for half in (torch.bfloat16, torch.float16) if half in dtypes), torch.float32)


@dataclass(frozen=True)
class _Part:
    path: Path
    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]
    raw: bytes


def read_gguf_header(path: Path) -> GgufFile:
    """Headers of a GGUF file or, if `path` is one of several parts, of all parts, checked against file sizes.

    Raises:
        SourceError: the file is not GGUF, is damaged or cut off, holds no model, or has tensor types that cannot be
            decoded; or another part is missing.
    """
    given = _read_part(path)
    parts = [given] if given.metadata.get("split.count", 1) == 1 else _read_parts(given)
    metadata = parts[0].metadata
    tensors = tuple(tensor for part in parts for tensor in part.tensors)
    architecture = metadata.get("general.architecture")
    other = _NO_MODEL.get(str(metadata.get("general.type")), _NO_MODEL.get(str(architecture)))
    if other is None and architecture is not None and not tensors:
        other = "a vocabulary and no weights"
    if other is not None:
        raise SourceError(f"{path} holds {other} and is not a model; give the .gguf file of the model itself.")
    if not isinstance(architecture, str):
        raise _damaged(path, "its header has no general.architecture")
    return GgufFile(parts[0].path, architecture, metadata, tensors, {part.path: part.raw for part in parts})


def model_name(path: Path) -> str:
    """The name of the model in a .gguf file: the name of the file, or the common name of its parts."""
    match = _PART.fullmatch(path.name)
    return path.stem if match is None else match["model"]


def _read_parts(given: _Part) -> list[_Part]:
    """All parts of the model of the part `given`, found next to it under the names that llama.cpp uses."""
    count = given.metadata["split.count"]
    match = _PART.fullmatch(given.path.name)
    named = match is not None and isinstance(count, int) and int(match["count"]) == count
    name = match["model"] if match is not None and named else "MODEL"
    paths = [given.path.with_name(f"{name}-{part:05}-of-{count:05}.gguf") for part in range(1, count + 1)]
    join = f"join them with `llama-gguf-split --merge {paths[0].name} {name}.gguf`"
    if not named:
        raise SourceError(
            f"{given.path} is one of {count} parts of a model but not named as one; name them {paths[0].name} and so "
            f"on, or {join}."
        )
    if absent := [path for path in paths if not path.is_file()]:
        raise SourceError(
            f"{given.path} is one of {count} parts of a model, and {absent[0].name} is not next to it; put all parts "
            f"in one folder, or {join}."
        )
    parts = [given if path == given.path else _read_part(path) for path in paths]
    names = [tensor.name for part in parts for tensor in part.tensors]
    total = parts[0].metadata.get("split.tensors.count", len(names))
    numbers = [part.metadata.get("split.no") for part in parts]
    if numbers != list(range(count)) or len(set(names)) != len(names) or len(names) != total:
        raise SourceError(
            f"{given.path} and the {count - 1} parts next to it are not from one model; download all of them again."
        )
    return parts


def _read_part(path: Path) -> _Part:
    from gguf.constants import GGML_QUANT_SIZES
    from transformers.integrations.gguf import reader

    size = path.stat().st_size
    if size < 24:
        raise _damaged(path, f"it holds {size} bytes, too few for a header")
    try:
        blob = reader._mapped(str(path))
        metadata, count, position = _read_metadata(blob)
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
        tensors.append(GgufTensor(name, tuple(shape), kind, start + offset, nbytes, path))
    return _Part(path, metadata, tuple(tensors), bytes(blob[:end]))


def _read_metadata(blob: Any) -> tuple[dict[str, Any], int, int]:
    """Metadata, the number of tensors, and the offset of their table.

    The function in transformers rejects files without an architecture, that is, all parts but the first.
    """
    from transformers.integrations.gguf import reader

    if bytes(blob[:4]) != b"GGUF":
        raise ValueError("it does not start with the GGUF magic bytes")
    version, tensors, entries = struct.unpack_from("<IQQ", blob, 4)
    if version not in reader._GGUF_VERSIONS:
        raise ValueError(f"it is of GGUF version {version}, which is not supported")
    position, metadata = 24, {}
    for _ in range(entries):
        key, position = reader._read_string(blob, position)
        (kind,) = struct.unpack_from("<I", blob, position)
        metadata[key], position = reader._read_value(blob, position + 4, kind)
    return metadata, tensors, position


def _damaged(path: Path, what: str) -> SourceError:
    return SourceError(f"{path} is damaged: {what}; download or copy the file again.")
