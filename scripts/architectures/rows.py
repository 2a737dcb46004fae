"""Outcomes in a file of JSON lines, so that a stopped check resumes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import transformers

from architectures.check import Outcome
from architectures.factory import Architecture
from shiftadd_cli.code_fingerprint import code_fingerprint


def state_of_the_code() -> str:
    """Fingerprint of all inputs of outcomes: this package, these scripts and the version of transformers."""
    digest = hashlib.sha256(f"{code_fingerprint()} {transformers.__version__}".encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


class Rows:
    """Outcomes of the current state of the code, by class name; those of other states are ignored."""

    def __init__(self, file: Path) -> None:
        self._file, self._state = file, state_of_the_code()
        self.outcomes: dict[str, Outcome] = {}
        if file.is_file():
            for line in file.read_text().splitlines():
                row = _row(line)
                if row.pop("state", None) == self._state:
                    outcome = Outcome(**row)
                    self.outcomes[outcome.name] = outcome

    def add(self, outcome: Outcome) -> None:
        """Store an outcome in memory and in the file."""
        self.outcomes[outcome.name] = outcome
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a") as file:
            file.write(json.dumps({"state": self._state, **outcome.to_dict()}) + "\n")

    def missing(self, architectures: list[Architecture]) -> list[Architecture]:
        """The architectures without an outcome."""
        return [architecture for architecture in architectures if architecture.name not in self.outcomes]


def _row(line: str) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except ValueError:
        # A killed run may leave half a line.
        return {}
