"""Pictures in a user's folder, with labels from sub-folders or from a table next to them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from shiftadd_cli.data.images_data import ImageData
from shiftadd_cli.errors import CalibrationError

_FILE, _CLASSES = ("file", "file_name", "filename", "image", "path"), ("name", "class", "label")


def read(path: Path) -> ImageData:
    """The pictures in a folder, in the order of their paths.

    The pictures are in the folder itself, or in one sub-folder per class, named after the class. Flat folders take
    labels from a table, if there is one: `labels.csv` or `metadata.csv` in the folder, or `FOLDER_labels.csv` next to
    it. It has a column `file` (path, or its end) and a column `name` (of the class) or `label` (name or number).

    Raises:
        CalibrationError: a picture has no class, or the table does not give it.
    """
    files = _pictures(path)
    keys = [file.relative_to(path).as_posix() for file in files]
    names = [str(file) for file in files]

    def encoded(index: int) -> bytes:
        return files[index].read_bytes()

    return ImageData(f"{path.resolve().name} ({len(files):,} images)", keys, names, encoded, _labels(path, files))


def _pictures(path: Path) -> list[Path]:
    try:
        from PIL import Image
    except ImportError as error:
        raise CalibrationError("Reading images needs Pillow; run `pip install 'shiftadd-cli[vision]'`.") from error

    endings = Image.registered_extensions()
    candidates = (file for pattern in ("*", "*/*") for file in path.glob(pattern))
    return sorted(
        file
        for file in candidates
        if file.suffix.lower() in endings and file.is_file() and not file.name.startswith(".")
    )


def _labels(path: Path, files: Sequence[Path]) -> tuple[str | int, ...] | None:
    direct = [file for file in files if file.parent == path]
    if not direct:
        return tuple(file.parent.name for file in files)
    if len(direct) < len(files):
        raise CalibrationError(
            f"{path} has images both directly and in sub-folders (such as {direct[0].name}); give one sub-folder for "
            "each class, or none."
        )
    table = path.resolve()
    candidates = (path / "labels.csv", path / "metadata.csv", table.with_name(f"{table.name}_labels.csv"))
    listing = next((candidate for candidate in candidates if candidate.is_file()), None)
    return None if listing is None else _from_table(listing, files)


def _from_table(listing: Path, files: Sequence[Path]) -> tuple[str | int, ...]:
    try:
        with listing.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise CalibrationError(f"{listing} is not a table of labels ({error}); save it as UTF-8 .csv.") from error
    columns = list(rows[0]) if rows else []
    file_column = next((name for name in _FILE if name in columns), None)
    class_column = next((name for name in _CLASSES if name in columns), None)
    if file_column is None or class_column is None:
        raise CalibrationError(
            f"{listing} needs the columns file and name or label (found {', '.join(columns) or 'none'}); rename them."
        )
    labels = {Path(row[file_column] or "").name: row[class_column] or "" for row in rows}
    missing = next((file for file in files if not labels.get(file.name)), None)
    if missing is not None:
        raise CalibrationError(f"{listing} has no label for {missing.name}; add it, or remove the image.")
    return tuple(int(label) if label.isdecimal() else label for label in (labels[file.name] for file in files))
