"""A calibration text that the model writes itself, so that it is about what the model knows and needs no download."""

from __future__ import annotations

from typing import Literal

Kind = Literal["documents", "conversations"]
# The default. A vision model draws nothing, so that for one it stands for pictures that are made, see `load_images`.
SELF = "self"
# Names of the text, and the kinds of windows that take turns in it.
KINDS: dict[str, tuple[Kind, ...]] = {
    SELF: ("documents", "conversations"),
    "self-plain": ("documents",),
    "self-chat": ("conversations",),
}
