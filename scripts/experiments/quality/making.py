"""Makes the artifact of a row: runs our command or a peer in a separate process, so that its peak memory is its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from experiments.quality.conditions import Cell
from experiments.quality.native import native_bits
from experiments.quality.peer_run import REPORT_FILE
from experiments.quality.rows import write_text
from shiftadd_cli.errors import ShiftaddError

_SCRIPTS = Path(__file__).resolve().parent.parent


class MakingError(ShiftaddError):
    """A method failed; the message is the last line that it printed, and the path of the log.

    reason: the message without the path, which means nothing to later readers of a table.
    """

    def __init__(self, reason: str, log: Path) -> None:
        super().__init__(f"{reason} (see {log})")
        self.reason = reason


def make_artifact(cell: Cell, model: str, work: Path) -> Path:
    """The folder of the compressed model, which may exist from an earlier run that was interrupted.

    The resolved recipe and the output of the process are in the same folder `work`, under `recipes` and `logs`.
    Raises MakingError.
    """
    out = work / "artifacts" / cell.artifact_name
    if out.is_dir():
        return out
    recipe = work / "recipes" / f"{cell.artifact_name}.yaml"
    write_text(recipe, yaml.safe_dump(cell.recipe.model_dump(mode="json"), sort_keys=False))
    if cell.method.peer:
        command = ["-m", "experiments.quality.peer_run", cell.method.peer.name, model, str(out), str(recipe)]
    else:
        command = ["-m", "shiftadd_cli", "quantize", model, "-o", str(out), "--recipe", str(recipe)]
    out.parent.mkdir(parents=True, exist_ok=True)
    run_logged(command, work / "logs" / f"{cell.artifact_name}.log")
    return out


def run_logged(arguments: Sequence[str], log: Path) -> None:
    """Run Python with these arguments and its output in the file `log`. Raises MakingError with the last line of it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as printed:
        done = subprocess.run(
            [sys.executable, *arguments], stdout=printed, stderr=subprocess.STDOUT, env=_environment(), check=False
        )
    if done.returncode:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        raise MakingError(lines[-1].strip() if lines else f"exit code {done.returncode}", log)


def read_report(cell: Cell, artifact: Path) -> dict[str, Any]:
    """The fields of a row that come from the report of the artifact."""
    if cell.method.peer:
        peer_report = json.loads((artifact / REPORT_FILE).read_text(encoding="utf-8"))
        return {**peer_report, "native_bits": peer_report["stored_bits"]}
    report = json.loads((artifact / "report.json").read_text(encoding="utf-8"))
    shapes = [(layer["out_features"], layer["in_features"]) for layer in report["layers"]]
    return {
        "stored_bits": report["size"]["bits_per_weight"],
        "file_bits": report["size"]["whole_file_bits_per_weight"],
        "native_bits": native_bits(shapes, cell.recipe),
        "seconds": report["seconds"]["total"],
        "peak_memory_bytes": report["machine"]["peak_memory_bytes"],
        "calibration": report["calibration"]["name"] if report["calibration"] else None,
    }


def _environment() -> dict[str, str]:
    """Our environment, with this checkout and its scripts importable, but without the current folder."""
    paths = [str(_SCRIPTS), str(_SCRIPTS.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONSAFEPATH": "1"}
