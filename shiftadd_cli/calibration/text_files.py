"""Text from .txt, .jsonl and .parquet files of the user."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from shiftadd_cli.errors import CalibrationError, first_line

FIELD = "text"
KINDS = ".txt, .jsonl or .parquet"
# More than any calibration or test needs; what lies beyond it is not read, and the name of the text says so.
MAX_CHARACTERS = 64 << 20


def read(path: Path) -> tuple[str, str]:
    """Name and text of a file: at most its first `MAX_CHARACTERS`; rows and records are joined by a blank line.

    Raises:
        CalibrationError: the file is missing, of another kind, not UTF-8, not valid, or has no `text` column.
    """
    if path.is_dir():
        raise CalibrationError(f"{path} is a folder; give a {KINDS} file.")
    if not path.is_file():
        raise CalibrationError(f"There is no file {path}; give a {KINDS} file, or 'builtin', which needs none.")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise CalibrationError(f"{path} is no {KINDS} file; save the text as one of these.")
    try:
        parts, used = [], 0
        for part in reader(path):
            parts.append(part[: MAX_CHARACTERS - used])
            used += len(part)
            if used > MAX_CHARACTERS:
                break
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read ({error.strerror or error}); give another file.") from error
    cut = f" (first {MAX_CHARACTERS >> 20} million characters)" if used > MAX_CHARACTERS else ""
    separator = "" if path.suffix.lower() == ".txt" else "\n\n"
    return path.name + cut, separator.join(parts)


def _plain(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as file:
        while chunk := file.read(1 << 20):
            yield chunk


def _json_lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise CalibrationError(f"{path}, line {number}, is no valid JSON ({error}); mend the line.") from error
            text = record.get(FIELD) if isinstance(record, dict) else None
            if not isinstance(text, str):
                has = f"the fields {', '.join(map(str, record))}" if isinstance(record, dict) and record else "none"
                raise CalibrationError(
                    f"{path}, line {number}, has no text in a field named {FIELD!r} (found {has}); rename the field."
                )
            yield text


def _parquet(path: Path) -> Iterator[str]:
    import pyarrow as arrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow
            kinds = {name: columns.field(name).type for name in columns.names}
            if FIELD not in kinds:
                raise CalibrationError(
                    f"{path} has no column {FIELD!r} (found {', '.join(kinds) or 'none'}); rename the one you want."
                )
            if not (arrow.types.is_string(kinds[FIELD]) or arrow.types.is_large_string(kinds[FIELD])):
                raise CalibrationError(
                    f"The column {FIELD!r} of {path} is {kinds[FIELD]}, not text; give a text column."
                )
            for batch in file.iter_batches(columns=[FIELD], batch_size=1024):
                yield from (row for row in batch.column(0).to_pylist() if row is not None)
    except arrow.ArrowException as error:
        raise CalibrationError(f"{path} is no valid parquet file ({first_line(error)}); download it again.") from error


READERS: dict[str, Callable[[Path], Iterator[str]]] = {".txt": _plain, ".jsonl": _json_lines, ".parquet": _parquet}
