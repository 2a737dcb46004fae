"""The licence of an original model, from its model card or file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from shiftadd_cli.source.gguf_header import read_gguf_header

_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", flags=re.DOTALL)
_LONGEST = 100


def source_license(path: Path) -> str | None:
    """The licence identifier in the model card of a folder or in a .gguf file; None if none is named."""
    named = (
        read_gguf_header(path).metadata.get("general.license") if path.is_file() else _front_matter(path).get("license")
    )
    return named if isinstance(named, str) and 0 < len(named.strip()) <= _LONGEST else None


def _front_matter(folder: Path) -> dict[str, Any]:
    """The metadata of README.md; empty if it is missing or cannot be read."""
    card = folder / "README.md"
    if not card.is_file():
        return {}
    match = _FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace"))
    try:
        metadata = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return metadata if isinstance(metadata, dict) else {}
