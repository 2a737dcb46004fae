"""Pictures in a folder of the user's, with labels by sub-folder or by a table beside them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from shiftadd_cli.data.images_data import ImageData
from shiftadd_cli.errors import CalibrationError

_FILE, _CLASSES = ("file", "file_name", "filename", "image", "path"), ("name", "class", "label")


def read(path: Path) -> ImageData:
    """The pictures in a folder, in the order of their paths.

    The pictures lie in the folder itself, or one sub-folder for each class, which its name says. Flat ones have the
    labels of a table `labels.csv` or `metadata.csv` in the folder, or `FOLDER_labels.csv` beside it, if there is one:
    a column `file` (path, or its end) and a column `name` (of the class) or `label` (name or number).

    Raises:
        CalibrationError: a picture is in no class, or the table does not say its.
    """
    files = _pictures(path)
    keys = [file.relative_to(path).as_posix() for file in files]
    places = [str(file) for file in files]

    def encoded(index: int) -> bytes:
        return files[index].read_bytes()

    return ImageData(f"{path.resolve().name} ({len(files):,} images)", keys, places, encoded, _labels(path, files))


def _pictures(path: Path) -> list[Path]:
    try:
        from PIL import Image
    except ImportError as error:
        raise CalibrationError("Reading images needs Pillow; run `pip install 'shiftadd-cli[vision]'`.") from error

    endings = Image.registered_extensions()
    found = (file for pattern in ("*", "*/*") for file in path.glob(pattern))
    return sorted(
        file for file in found if file.suffix.lower() in endings and file.is_file() and not file.name.startswith(".")
    )


def _labels(path: Path, files: Sequence[Path]) -> tuple[str | int, ...] | None:
    beside = [file for file in files if file.parent == path]
    if not beside:
        return tuple(file.parent.name for file in files)
    if len(beside) < len(files):
        raise CalibrationError(
            f"{path} holds images of its own and in sub-folders (such as {beside[0].name}); give one sub-folder for "
            "each class, or none."
        )
    table = path.resolve()
    places = (path / "labels.csv", path / "metadata.csv", table.with_name(f"{table.name}_labels.csv"))
    listing = next((place for place in places if place.is_file()), None)
    return None if listing is None else _from_table(listing, files)


def _from_table(listing: Path, files: Sequence[Path]) -> tuple[str | int, ...]:
    try:
        with listing.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise CalibrationError(f"{listing} is no table of labels ({error}); save it as UTF-8 .csv.") from error
    columns = list(rows[0]) if rows else []
    place = next((name for name in _FILE if name in columns), None)
    value = next((name for name in _CLASSES if name in columns), None)
    if place is None or value is None:
        raise CalibrationError(
            f"{listing} needs the columns file and name or label (found {', '.join(columns) or 'none'}); rename them."
        )
    found = {Path(row[place] or "").name: row[value] or "" for row in rows}
    missing = next((file for file in files if not found.get(file.name)), None)
    if missing is not None:
        raise CalibrationError(f"{listing} has no label for {missing.name}; add it, or remove the image.")
    return tuple(int(label) if label.isdecimal() else label for label in (found[file.name] for file in files))
