"""The place that an export is written to."""

from __future__ import annotations

from pathlib import Path

from shiftadd_cli.artifact.output import check_output
from shiftadd_cli.errors import OutputError


def check_place(out: Path, source: Path, expected_bytes: int) -> None:
    """Refuse, before any work, a folder that cannot be written, or is not empty: no export is ever overwritten."""
    if out.is_dir() and any(out.iterdir()):
        raise OutputError(f"{out} exists and is not empty; give a folder that does not exist yet to -o.")
    check_output(out, source, overwrite=False, expected_bytes=expected_bytes)
