"""Sets of pictures, as every reader of them gives them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class ImageData:
    """Pictures that are read one by one.

    Attributes:
        name: what to call them in a report.
        keys: what tells each picture from the others of the set, wherever the set lies and however its path is typed.
        places: what to call each picture in messages.
        read: the encoded picture of a number; may raise OSError.
        labels: the class of each, by name or number; None where they have none.
        fingerprint_samples: how many pictures the fingerprint reads.
    """

    name: str
    keys: Sequence[str]
    places: Sequence[str]
    read: Callable[[int], bytes]
    labels: tuple[str | int, ...] | None = None
    fingerprint_samples: int = 256

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the keys of all pictures and the bytes of some at equal distances."""
        digest = hashlib.sha256("\0".join(self.keys).encode(errors="surrogateescape"))
        for index in spread(len(self), self.fingerprint_samples):
            try:
                digest.update(hashlib.sha256(self.read(index)).digest())
            except OSError:  # told of when it is needed
                digest.update(b"unreadable")
        return digest.hexdigest()


def spread(length: int, most: int | None) -> list[int]:
    """At most so many of the numbers below `length`, evenly from the first to the last."""
    if most is None or most >= length:
        return list(range(length))
    return torch.linspace(0, length - 1, most, dtype=torch.float64).round().long().unique().tolist()
