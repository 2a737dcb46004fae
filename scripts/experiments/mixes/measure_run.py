"""Measures one sensitivity in a separate process, so that its seconds and peak memory are its own.

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

# More than any layer takes: nothing is chosen here.
_ANY = Budget.parse(1000.0, None)


def measure(model: str, recipe: Recipe, sensitivity: Any) -> dict[str, Any]:
    """The measured fields of a `SensitivityRow`, at the candidates of the recipe."""
    request = Request(_ANY, recipe.candidates, sensitivity)
    job = AllocationJob.prepare(open_source(model, dtype=recipe.dtype), recipe, request)
    start = time.monotonic()
    sensitivities = job.measure(recipe.candidates)
    return {
        "costs": sensitivities.costs,
        "shared_inputs": sensitivities.shared_inputs,
        "seconds": time.monotonic() - start,
        "peak_memory_bytes": resident_bytes(),
    }


def main(arguments: list[str]) -> None:
    """See the docstring of the module."""
    model, recipe, sensitivity, candidates, out = arguments
    try:
        fields = {"candidates": tuple(map(int, candidates.split(",")))}
        measured = measure(model, Recipe.load(recipe, fields), sensitivity)
    except ShiftaddError as error:
        sys.exit(f"Error: {error}")
    write_text(Path(out), json.dumps(measured))


if __name__ == "__main__":
    main(sys.argv[1:])
