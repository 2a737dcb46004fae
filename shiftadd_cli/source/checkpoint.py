"""What a `Source` needs of the files it reads, whatever their format."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

_SAMPLES = 256
_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class TensorHeader:
    """What the header of a file says of one tensor.

    dtype: None where the file holds quantized blocks that are decoded on read. nbytes: the size in the file. target:
    the name that the tensor would have in the model, where no transform translates its own.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    nbytes: int
    target: str | None = None


class Checkpoint(Protocol):
    """A set of named tensors on disk whose headers have been read and checked.

    `tensors` is keyed by the names that the transforms of `loader` map to parameters of the model.
    """

    files: tuple[Path, ...]
    tensors: dict[str, TensorHeader]

    @property
    def stored_dtype(self) -> torch.dtype | None:
        """The float dtype most weights are stored in; None where none is."""

    def fingerprint(self, digest: Any) -> None:
        """Add the identity of every file to `digest` (a hashlib object)."""

    def loader(self, model: Any, dtype: torch.dtype) -> tuple[list[Any], Any]:
        """transformers' `WeightTransform`s from `tensors` to the parameters of `model` (on meta), and the
        `HfQuantizer` its loader needs beside them, or None."""

    def opened(self, names: Iterable[str]) -> AbstractContextManager[dict[str, Any]]:
        """Lazy tensors by name; indexing one with `...` reads it into memory of its own.

        Raises:
            OSError: a file is gone or has changed.
        """


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bytes; unlike `equal`, NaN is the same as NaN."""
    first, second = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(first, second)


def fingerprint_file(digest: Any, path: Path, header: bytes) -> None:
    """Add the identity of a weight file to `digest`: its name, its size, its header and samples of its content.

    Reading whole checkpoints would take minutes, and headers alone cannot tell two fine-tunings of one model apart;
    256 pages of 4096 bytes at equal distances cost about a megabyte of reading and differ when most weights do.
    Not a proof against deliberate tampering.
    """
    size = path.stat().st_size
    digest.update(f"{path.name}\0{size}\0".encode())
    digest.update(hashlib.sha256(header).digest())
    with path.open("rb") as file:
        for sample in range(_SAMPLES):
            file.seek(max(size - _SAMPLE_BYTES, 0) * sample // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
