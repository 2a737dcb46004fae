"""Sets of pictures, as all readers return them."""

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
        name: name in reports.
        keys: identify each picture within the set, independent of the set's location and the spelling of its path.
        places: names of the pictures in messages.
        read: returns the encoded picture with a given number; may raise OSError.
        labels: the class of each picture, by name or number; None for pictures without classes.
        fingerprint_samples: number of pictures that the fingerprint reads.
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
            except OSError:  # reported when the picture is needed
                digest.update(b"unreadable")
        return digest.hexdigest()


def spread(length: int, most: int | None) -> list[int]:
    """At most `most` of the numbers below `length`, evenly spaced from the first to the last."""
    if most is None or most >= length:
        return list(range(length))
    return torch.linspace(0, length - 1, most, dtype=torch.float64).round().long().unique().tolist()
