"""Checks of the output folder before any work."""

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

    `source` is the file or folder of the model, None for one that is not a local path of the user; `expected_bytes`
    is what will be written. Raises OutputError naming the path and the cure.
    """
    place = out.resolve()
    try:
        str(place).encode()
    except UnicodeEncodeError as failure:
        # safetensors opens no file under such a name, so nobody could load the result.
        shown = str(out).encode(errors="backslashreplace").decode()
        raise OutputError(f"The name {shown} is no text in utf-8; give another folder.") from failure
    if source is not None:
        _check_apart(out, place, source)
    if place.exists() and not place.is_dir():
        raise OutputError(f"{out} is a file; give a folder that does not exist yet to -o.")
    if place.is_dir() and any(place.iterdir()):
        if not overwrite:
            raise OutputError(f"{out} exists and is not empty; add `overwrite=True` to replace it.")
        if not is_checkpoint(place):
            raise OutputError(
                f"{out} was not written by shiftadd, so `overwrite` does not delete it; remove it yourself or choose "
                "another folder."
            )
    parent = next(folder for folder in place.parents if folder.exists())
    if not parent.is_dir():
        raise OutputError(f"{parent} is a file, so {out} cannot be created; choose another folder.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"No permission to write in {parent}; choose another folder.")
    check_space(out, expected_bytes)


def check_space(out: Path, expected_bytes: int) -> None:
    """Raise OutputError if the disk of `out` has less free. What an unfinished run takes there counts as free: it is
    for the run that goes on, or starts anew."""
    place = out.resolve()
    parent = next(folder for folder in place.parents if folder.exists())
    free = shutil.disk_usage(parent).free + _disk_bytes(partial_folder(place))
    if free < expected_bytes:
        raise OutputError(
            f"{parent} has {free / 1e6:,.0f} MB free and {expected_bytes / 1e6:,.0f} MB are needed; free some space or "
            "choose another disk."
        )


def partial_folder(out: Path) -> Path:
    """The folder of the unfinished run that is to become `out`."""
    return out.parent / f".{out.name}.partial"


def _disk_bytes(folder: Path) -> int:
    taken = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # a run at work there removes files
            taken += 512 * path.stat().st_blocks
    return taken


def _check_apart(out: Path, place: Path, source: Path) -> None:
    model = source.resolve()
    if place == model:
        raise OutputError(f"{out} is the model itself; choose another folder.")
    if place.is_relative_to(model):
        raise OutputError(f"{out} is inside the model's folder {source}; choose a folder outside it.")
    if model.is_relative_to(place):
        raise OutputError(f"The model {source} is inside {out}; choose another folder.")


def is_checkpoint(folder: Path) -> bool:
    """Whether there is a checkpoint of ours."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return bool(config["quantization_config"]["quant_method"] == QUANT_METHOD)
    except (OSError, ValueError, KeyError, TypeError):
        return False
