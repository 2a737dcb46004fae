"""What JSON and YAML files are read into."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class FilePart(BaseModel):
    """A part of a file: immutable, and without fields that are not known."""

    model_config = ConfigDict(frozen=True, extra="forbid")
