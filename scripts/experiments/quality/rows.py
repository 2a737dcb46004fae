"""Results on disk: one JSON file per finished measurement, named by all its settings."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from shiftadd_cli.errors import ShiftaddError
from shiftadd_cli.storage.durable import replace_file

# Covariant, since measurements are never changed.
S_co = TypeVar("S_co", bound=BaseModel, covariant=True)
R = TypeVar("R", bound="Stored[BaseModel]")


class TestScore(BaseModel):
    """Scores of one model on one text, as `Evaluation` gives them; perplexity is None if it overflows."""

    __test__ = False
    model_config = ConfigDict(frozen=True, extra="forbid")

    perplexity: float | None
    perplexity_error: float | None
    nll: float
    kl: float | None
    kl_error: float | None
    agreement: float | None
    tokens: int
    scored_tokens: int
    windows: int
    dtype: str
    device: str


class Stored(BaseModel, Generic[S_co]):
    """A measurement that can be written and read again; its fingerprint is that of `settings`.

    `scores` are by test; texts and images have score types of their own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: dict[str, Any]
    scores: dict[str, S_co]
    machine: dict[str, str]


class OriginalOf(Stored[S_co], Generic[S_co]):
    """The model before compression."""

    file_bits_per_weight: float
    parameters: int


class RowOf(Stored[S_co], Generic[S_co]):
    """One method at one bit width.

    Attributes:
        stored_bits, file_bits: bits per weight as stored, of the quantized layers and of the whole file.
        native_bits: bits per weight of the quantized layers in a uniform format of their own; None for other grids.
        seconds, peak_memory_bytes: of the quantization, from its report.
        calibration: the text's name, None for a method that uses none.
        code: SHA-256 of the sources that computed it; not in the settings, because most source changes change no row.
    """

    method: str
    bits: int
    stored_bits: float
    file_bits: float
    native_bits: float | None
    seconds: float
    peak_memory_bytes: int
    calibration: str | None
    code: str


Original = OriginalOf[TestScore]
Row = RowOf[TestScore]


def fingerprint(settings: dict[str, Any]) -> str:
    """SHA-256, in hex, of settings as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def file_name(label: str, bits: int, settings: dict[str, Any]) -> str:
    """A readable name for a row or a folder, which differs if the settings differ."""
    readable = re.sub(r"[^A-Za-z0-9.=-]+", "_", label)[:80].strip("_.")
    return f"{readable}-{bits}bit-{fingerprint(settings)[:16]}"


def write_text(path: Path, text: str) -> None:
    """Write a file completely or not at all, also after a power failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text.encode())


def write_stored(path: Path, stored: Stored[BaseModel]) -> None:
    """Write a measurement durably."""
    write_text(path, stored.model_dump_json(indent=2) + "\n")


def read_stored(path: Path, kind: type[R], settings: dict[str, Any]) -> R | None:
    """The measurement of these settings in `path`, or None without such a file.

    Raises ShiftaddError for a file with other content.
    """
    if not path.is_file():
        return None
    try:
        stored = kind.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError):
        raise ShiftaddError(f"{path} is not a row of this benchmark; remove it to measure it again.") from None
    # Through JSON, like the file: tuples become lists.
    if stored.settings != json.loads(json.dumps(settings)):
        raise ShiftaddError(f"{path} holds other settings than its name says; remove it to measure it again.")
    return stored
