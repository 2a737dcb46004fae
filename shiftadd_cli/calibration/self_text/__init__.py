"""A calibration text that the model writes itself, so that it is about what the model knows and needs no download."""

from __future__ import annotations

from typing import Literal

Kind = Literal["documents", "conversations"]
# Names of the text, and the kinds of windows that take turns in it.
KINDS: dict[str, tuple[Kind, ...]] = {
    "self": ("documents", "conversations"),
    "self-plain": ("documents",),
    "self-chat": ("conversations",),
}
