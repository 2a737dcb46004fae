"""The output paths of plan.json and its plot: checked before the work, written after it."""

from __future__ import annotations

import os
from pathlib import Path

from shiftadd_cli.allocation.plan_file import BitPlan
from shiftadd_cli.errors import OutputError
from shiftadd_cli.storage.refusals import write_file


def check_plan_output(out: Path, *, overwrite: bool, option: str = "-o", example: str = "plan.json") -> None:
    """Refuse, before any work, a path where a file cannot be written.

    option: the option that names the path; example: a valid file name. Raises OutputError.
    """
    if out.is_dir():
        raise OutputError(f"{out} is a folder; give the path of a file, such as {example}, to {option}.")
    if out.exists() and not overwrite:
        raise OutputError(f"{out} exists; add --overwrite to replace it.")
    if not out.resolve().parent.is_dir():
        raise OutputError(f"The folder {out.parent} does not exist; create it, or choose another path.")
    if not os.access(out.resolve().parent, os.W_OK | os.X_OK):
        raise OutputError(f"No permission to write in {out.parent}; choose another folder.")


def write_plan(plan: BitPlan, out: Path) -> None:
    """Write plan.json atomically. Raises OutputError if the write fails."""
    write_file(out, plan.to_json())
