"""The journal of an unfinished run: one small JSON file per finished step, on disk before the next step begins.

    {"sha256": "...", "record": {...}}

The checksum covers the record as JSON with sorted keys. Nothing depends on file times.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shiftadd_cli.errors import ResumeError
from shiftadd_cli.storage.refusals import refusals, write_file

# A block of ten thousand experts takes about 10 MB.
_MAX_BYTES = 200_000_000


class Journal:
    """Records by name, stored in `folder`.

    Raises ResumeError, in one sentence, for a damaged record.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._records: dict[str, dict[str, Any]] = {}
        if folder.is_dir():
            self._records = {path.stem: _read(path) for path in sorted(folder.glob("*.json"))}

    def __len__(self) -> int:
        return len(self._records)

    def get(self, name: str) -> dict[str, Any] | None:
        """The record of that name; None if there is none."""
        return self._records.get(name)

    def starting(self, prefix: str) -> dict[str, dict[str, Any]]:
        """All records whose names start with `prefix`, in the order of their names."""
        return {name: record for name, record in self._records.items() if name.startswith(prefix)}

    def put(self, name: str, record: Mapping[str, Any]) -> None:
        """Store a record of plain JSON values; it is on disk when this returns. Raises OutputError."""
        path = self.folder / f"{name}.json"
        content = {"sha256": _sum(record), "record": record}
        with refusals(path):
            self.folder.mkdir(exist_ok=True)
        write_file(path, json.dumps(content, ensure_ascii=False) + "\n")
        self._records[name] = dict(record)


def _read(path: Path) -> dict[str, Any]:
    try:
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise ValueError(f"it has {size:,} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not isinstance(content.get("record"), dict):
            raise ValueError("it is not a record")
        if _sum(content["record"]) != content.get("sha256"):
            raise ValueError("it does not match its checksum")
    except (OSError, ValueError, RecursionError) as failure:
        raise damaged(path, " ".join(str(failure).split())) from failure
    record: dict[str, Any] = content["record"]
    return record


def damaged(path: Path, reason: str) -> ResumeError:
    """The error for an unusable part of an unfinished run."""
    return ResumeError(
        f"The unfinished run cannot continue: {path} is damaged ({reason}); start over with `resume=False`."
    )


def _sum(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
