"""The interface between a `Source` and the files it reads, whatever their format."""

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
    """The entry of one tensor in the header of a file.

    dtype: None if the file holds quantized blocks that are decoded on read. nbytes: the size in the file. target: the
    name that the tensor would have in the model, if no transform translates its own.
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
        """The float dtype of most stored weights; None if there is none."""

    def fingerprint(self, digest: Any) -> None:
        """Add the identity of every file to `digest` (a hashlib object)."""

    def loader(self, model: Any, dtype: torch.dtype) -> tuple[list[Any], Any]:
        """The `WeightTransform`s of transformers from `tensors` to the parameters of `model` (on meta), and the
        `HfQuantizer` that its loader also needs, or None."""

    def opened(self, names: Iterable[str]) -> AbstractContextManager[dict[str, Any]]:
        """Lazy tensors by name; indexing one with `...` reads it into new memory.

        Raises:
            OSError: a file is gone or has changed.
        """


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of equal shape and dtype hold the same bytes; unlike in `equal`, NaN equals NaN."""
    first, second = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(first, second)


def fingerprint_file(digest: Any, path: Path, header: bytes) -> None:
    """Add the identity of a weight file to `digest`: its name, its size, its header and samples of its content.

    Reading whole checkpoints would take minutes, and headers alone cannot distinguish two fine-tunings of one model.
    256 evenly spaced pages of 4096 bytes cost about a megabyte of reading and differ if most weights do. This does not
    protect against deliberate tampering.
    """
    size = path.stat().st_size
    digest.update(f"{path.name}\0{size}\0".encode())
    digest.update(hashlib.sha256(header).digest())
    with path.open("rb") as file:
        for sample in range(_SAMPLES):
            file.seek(max(size - _SAMPLE_BYTES, 0) * sample // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
