"""Checks of the output folder, made before any work."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

from shiftadd_cli.errors import OutputError
from shiftadd_cli.version import QUANT_METHOD


def check_output(out: Path, source: Path | None, *, overwrite: bool, expected_bytes: int = 0) -> None:
    """Refuse, before any work, an output folder that cannot or must not be written.

    `source` is the file or folder of the model, None if it is not a local path of the user; `expected_bytes` is the
    size of the output. Raises OutputError naming the path and the cure.
    """
    target = out.resolve()
    try:
        str(target).encode()
    except UnicodeEncodeError as failure:
        # safetensors cannot open a file under such a name, so nobody could load the result.
        shown = str(out).encode(errors="backslashreplace").decode()
        raise OutputError(f"The name {shown} is not valid utf-8 text; give another folder.") from failure
    if source is not None:
        _check_apart(out, target, source)
    if target.exists() and not target.is_dir():
        raise OutputError(f"{out} is a file; give a folder that does not exist yet.")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise OutputError(f"{out} exists and is not empty; add `overwrite=True` to replace it.")
        if not is_checkpoint(target):
            raise OutputError(
                f"{out} was not written by shiftadd, so `overwrite` does not delete it; remove it yourself or choose "
                "another folder."
            )
    parent = next(folder for folder in target.parents if folder.exists())
    if not parent.is_dir():
        raise OutputError(f"{parent} is a file, so {out} cannot be created; choose another folder.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"No permission to write in {parent}; choose another folder.")
    check_space(out, expected_bytes)


def check_space(out: Path, expected_bytes: int) -> None:
    """Raise OutputError if the disk of `out` has less than `expected_bytes` free. Space taken by an unfinished run
    counts as free, because the next run reuses or removes it."""
    target = out.resolve()
    parent = next(folder for folder in target.parents if folder.exists())
    free = shutil.disk_usage(parent).free + _disk_bytes(partial_folder(target))
    if free < expected_bytes:
        raise OutputError(
            f"{parent} has {free / 1e6:,.0f} MB free and {expected_bytes / 1e6:,.0f} MB are needed; free some space or "
            "choose another disk."
        )


def partial_folder(out: Path) -> Path:
    """The working folder of a run that writes `out`."""
    return out.parent / f".{out.name}.partial"


def _disk_bytes(folder: Path) -> int:
    taken = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # an active run removes files
            taken += 512 * path.stat().st_blocks
    return taken


def _check_apart(out: Path, target: Path, source: Path) -> None:
    model = source.resolve()
    if target == model:
        raise OutputError(f"{out} is the model itself; choose another folder.")
    if target.is_relative_to(model):
        raise OutputError(f"{out} is inside the model's folder {source}; choose a folder outside it.")
    if model.is_relative_to(target):
        raise OutputError(f"The model {source} is inside {out}; choose another folder.")


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` holds a shiftadd checkpoint."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return bool(config["quantization_config"]["quant_method"] == QUANT_METHOD)
    except (OSError, ValueError, KeyError, TypeError):
        return False
