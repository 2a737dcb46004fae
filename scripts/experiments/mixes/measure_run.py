"""Measure one sensitivity in a process of its own, so that its seconds and peak memory are its own.

python -m experiments.mixes.measure_run MODEL RECIPE.yaml SENSITIVITY CANDIDATES OUT.json
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from experiments.quality.rows import write_text
from shiftadd_cli.allocation.budget import Budget
from shiftadd_cli.errors import ShiftaddError
from shiftadd_cli.pipeline.allocate import AllocationJob, Request
from shiftadd_cli.pipeline.memory import resident_bytes
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.source import open_source

# More than any layer takes: here nothing is chosen.
_ANY = Budget.parse(1000.0, None)


def measure(model: str, recipe: Recipe, sensitivity: Any) -> dict[str, Any]:
    """The fields of a `SensitivityRow` that are measured, at the candidates of the recipe."""
    request = Request(_ANY, recipe.candidates, sensitivity)
    job = AllocationJob.prepare(open_source(model, dtype=recipe.dtype), recipe, request)
    start = time.monotonic()
    found = job.measure(recipe.candidates)
    return {
        "costs": found.costs,
        "shared_inputs": found.shared_inputs,
        "seconds": time.monotonic() - start,
        "peak_memory_bytes": resident_bytes(),
    }


def main(arguments: list[str]) -> None:
    """See the module."""
    model, recipe, sensitivity, candidates, out = arguments
    try:
        fields = {"candidates": tuple(map(int, candidates.split(",")))}
        found = measure(model, Recipe.load(recipe, fields), sensitivity)
    except ShiftaddError as error:
        sys.exit(f"Error: {error}")
    write_text(Path(out), json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
