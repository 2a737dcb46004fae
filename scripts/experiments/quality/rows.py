"""Results on disk: one JSON file per finished measurement, named by everything that fixes it."""

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
    """Scores of one model on one text, as `Evaluation` gives them; perplexity is None where it is beyond all bounds."""

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
    """A measurement that can be written and found again; `settings` is what its fingerprint is taken of.

    `scores` are by test; those of texts and of images have types of their own.
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
        native_bits: of the quantized layers in a uniform format of their own; None for other grids.
        seconds, peak_memory_bytes: of quantizing, as its report says.
        calibration: the text's name, None for a method that uses none.
        code: SHA-256 of the sources that computed it; not among the settings, since most changes of them change no row.
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
    """A name for a row or a folder that says what it is and differs where settings do."""
    readable = re.sub(r"[^A-Za-z0-9.=-]+", "_", label)[:80].strip("_.")
    return f"{readable}-{bits}bit-{fingerprint(settings)[:16]}"


def write_text(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text.encode())


def write_stored(path: Path, stored: Stored[BaseModel]) -> None:
    """Write a measurement durably."""
    write_text(path, stored.model_dump_json(indent=2) + "\n")


def read_stored(path: Path, kind: type[R], settings: dict[str, Any]) -> R | None:
    """The measurement of these settings in `path`, or None without such a file.

    Raises ShiftaddError for a file that holds something else.
    """
    if not path.is_file():
        return None
    try:
        found = kind.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError):
        raise ShiftaddError(f"{path} is no row of this benchmark; remove it to have it measured again.") from None
    # Through JSON, as the file has been: tuples come back as lists.
    if found.settings != json.loads(json.dumps(settings)):
        raise ShiftaddError(f"{path} is named for other settings than it holds; remove it to have it measured again.")
    return found
