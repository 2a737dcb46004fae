"""Base class of the models that JSON and YAML files are read into."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class FilePart(BaseModel):
    """A part of a file: immutable, and unknown fields are rejected."""

    model_config = ConfigDict(frozen=True, extra="forbid")
