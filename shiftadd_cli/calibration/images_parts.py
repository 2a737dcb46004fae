"""What every reader of image sets gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple


class ImageParts(NamedTuple):
    """Name, places, reader and labels of pictures, see `images.ImageData`."""

    name: str
    places: Sequence[str]
    read: Callable[[int], bytes]
    labels: tuple[str | int, ...] | None
