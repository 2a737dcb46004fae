"""Pictures in tables: the user's .parquet files, and data sets of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shiftadd_cli.data.images_data import ImageData
from shiftadd_cli.data.text_hub import ENDPOINT, offline, reachable
from shiftadd_cli.errors import CalibrationError, first_line

# Usual names of columns that have no type of the `datasets` library.
_IMAGES, _LABELS = ("image", "img", "picture"), ("label", "labels", "fine_label", "class")
# Splits to try where none is named, best first.
_SPLITS = {"calibration": ("train",), "test": ("test", "validation", "valid", "val")}


def read_parquet(path: Path) -> ImageData:
    """The pictures in a .parquet file.

    Raises:
        CalibrationError: the file is missing, not valid, or has no column of images.
    """
    import pyarrow as arrow
    from datasets import Dataset
    from pyarrow import parquet

    if not path.is_file():
        raise CalibrationError(
            f"There is no file {path}; give an existing one, or 'noise' or 'builtin', which need none."
        )
    try:
        table = parquet.read_table(path, memory_map=True)
        rows = Dataset(table)
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise CalibrationError(
            f"{path} is not a valid parquet file ({first_line(error)}); download it again."
        ) from error
    return _data(rows, path.name)


def read_hub(spec: str, split: str) -> ImageData:
    """The pictures in a hub data set, `NAME` or `NAME:SPLIT`; `split` is "calibration" or "test".

    Without a network, this uses a copy in the cache of `datasets`; without a copy, it fails within seconds.

    Raises:
        CalibrationError: it cannot be downloaded, or has no column of images.
    """
    import datasets

    name, _, part = spec.partition(":")
    online = reachable(ENDPOINT)
    try:
        with offline(not online):
            hub_split = part or _choose(datasets.get_dataset_split_names(name), split)
            rows = datasets.load_dataset(name, split=hub_split)
    # A dozen libraries are involved in reaching the hub; whatever goes wrong, the remedy is the same.
    except Exception as error:
        reason = first_line(error) if online else "the hub cannot be reached, and the cache has no copy"
        raise CalibrationError(
            f"There are no images at {name}: no such folder or file, and the data set {name} of the hub could not be "
            f"downloaded ({reason}); give a folder of images, or 'noise' or 'builtin', which need no download."
        ) from error
    return _data(rows, f"{name} {hub_split}")


def _choose(splits: Sequence[str], split: str) -> str:
    return next((name for name in _SPLITS[split] if name in splits), splits[0])


def _data(rows: Any, name: str) -> ImageData:
    import pyarrow as arrow
    from datasets import ClassLabel, Image

    features = rows.features
    pictures = [key for key, kind in features.items() if isinstance(kind, Image)]
    pictures += [key for key in _IMAGES if key in features]
    if not pictures:
        raise CalibrationError(
            f"{name} has no column of images (found {', '.join(features) or 'none'}); name it 'image', with the "
            "encoded pictures in it."
        )
    kinds = [key for key, kind in features.items() if isinstance(kind, ClassLabel)]
    kinds += [key for key in _LABELS if key in features]
    labels: tuple[str | int, ...] | None = None
    if kinds:
        values, feature = rows[kinds[0]], features[kinds[0]]
        labels = tuple(feature.int2str(value) if isinstance(feature, ClassLabel) else value for value in values)
        if not all(isinstance(label, (str, int)) for label in labels):
            raise CalibrationError(
                f"The column {kinds[0]!r} of {name} does not contain classes; remove it, or repair it."
            )
    try:
        column = rows.select_columns(pictures[0]).cast_column(pictures[0], Image(decode=False))
    except (TypeError, ValueError, arrow.ArrowException) as error:
        raise CalibrationError(
            f"The column {pictures[0]!r} of {name} does not contain images ({first_line(error)})."
        ) from error

    def encoded(index: int) -> bytes:
        cell = column[index][pictures[0]]
        if cell is None:
            raise OSError("the cell is empty")
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

    keys = [f"row {number}" for number in range(len(rows))]
    return ImageData(name, keys, [f"{name}, {key}" for key in keys], encoded, labels)
