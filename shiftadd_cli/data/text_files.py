"""Text or conversations from the user's .txt, .jsonl and .parquet files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shiftadd_cli.data import conversations
from shiftadd_cli.errors import CalibrationError, first_line

FIELD = "text"
KINDS = ".txt, .jsonl or .parquet"
# More than any calibration or test needs. The rest is not read, and the name of the text says so.
MAX_CHARACTERS = 64 << 20
# The location of a record, and its text or its messages.
Record = tuple[str, str | list[dict[str, Any]]]


def read(path: Path, tokenizer: Any = None) -> tuple[str, str]:
    """Name and text of a file: at most its first `MAX_CHARACTERS`.

    Rows and records are joined by a blank line. Conversations are rendered by the chat template of `tokenizer` and
    follow each other directly.

    Raises:
        CalibrationError: the file is missing, of another kind, not UTF-8, not valid, or has neither `text` nor
            `messages`; or the template rejects the messages.
    """
    if path.is_dir():
        raise CalibrationError(f"{path} is a folder; give a {KINDS} file.")
    if not path.is_file():
        raise CalibrationError(f"There is no file {path}; give a {KINDS} file, or 'builtin', which needs none.")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise CalibrationError(f"{path} is not a {KINDS} file; save the text as one of these.")
    # Plain text comes in pieces of any length, text records are separated, and conversations mark their own end.
    between = "" if reader is _plain else "\n\n"
    try:
        parts, used, separator = [], 0, ""
        for where, record in reader(path):
            if isinstance(record, str):
                part, separator = separator + record, between
            else:
                part, separator = conversations.render(record, tokenizer, where=where), ""
            parts.append(part[: MAX_CHARACTERS - used])
            used += len(part)
            if used > MAX_CHARACTERS:
                break
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read ({error.strerror or error}); give another file.") from error
    cut = f" (first {MAX_CHARACTERS >> 20} million characters)" if used > MAX_CHARACTERS else ""
    return path.name + cut, "".join(parts)


def _plain(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig") as file:
        while chunk := file.read(1 << 20):
            yield str(path), chunk


def _json_lines(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise CalibrationError(f"{path}, line {number}, is not valid JSON ({error}); fix the line.") from error
            fields = record if isinstance(record, dict) else {}
            where = f"{path}, line {number},"
            if isinstance(text := fields.get(FIELD), str):
                yield where, text
            elif conversations.is_conversation(messages := fields.get(conversations.FIELD)):
                yield where, messages
            else:
                has = f"the fields {', '.join(map(str, fields))}" if fields else "none"
                raise CalibrationError(
                    f"{where} has no text in a field named {FIELD!r}, nor messages in one named "
                    f"{conversations.FIELD!r} (found {has}); rename the field."
                )


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow as arrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow
            kinds = {name: columns.field(name).type for name in columns.names}
            field = FIELD if FIELD in kinds else conversations.FIELD
            if field not in kinds:
                raise CalibrationError(
                    f"{path} has no column {FIELD!r}, nor {conversations.FIELD!r} "
                    f"(found {', '.join(kinds) or 'none'}); rename the one you want."
                )
            is_text = arrow.types.is_string(kinds[field]) or arrow.types.is_large_string(kinds[field])
            if field == FIELD and not is_text:
                raise CalibrationError(
                    f"The column {FIELD!r} of {path} is {kinds[FIELD]}, not text; give a text column."
                )
            batches = file.iter_batches(columns=[field], batch_size=1024)
            for number, row in enumerate((row for batch in batches for row in batch.column(0).to_pylist()), start=1):
                where = f"{path}, row {number},"
                if row is None:
                    continue
                if field != FIELD and not conversations.is_conversation(row):
                    raise CalibrationError(
                        f"{where} has no messages with a role in the column {field!r}; give another file."
                    )
                yield where, row
    except arrow.ArrowException as error:
        raise CalibrationError(
            f"{path} is not a valid parquet file ({first_line(error)}); download it again."
        ) from error


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {".txt": _plain, ".jsonl": _json_lines, ".parquet": _parquet}
