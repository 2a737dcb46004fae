"""A run from its arguments: every check that can be made before the work, then the work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from shiftadd_cli.artifact.output import check_output
from shiftadd_cli.device import choose_device
from shiftadd_cli.pipeline.plan import Plan, make_plan
from shiftadd_cli.pipeline.run import load_calibration, run_plan
from shiftadd_cli.progress import progress
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.report.schema import Report
from shiftadd_cli.source import open_source


@dataclass(frozen=True)
class Job:
    """A planned run; nothing has been written yet."""

    plan: Plan
    out: Path
    device: torch.device
    overwrite: bool

    @classmethod
    def prepare(cls, model: str, out: Path, recipe: Recipe, *, overwrite: bool = False) -> Job:
        """Plan to compress `model` (hub id, folder, .gguf file or `demo`) into the folder `out`, from headers alone.

        Raises ShiftaddError, saying what to do, for everything that can be known to be wrong now.
        """
        local = Path(model) if Path(model).exists() else None
        check_output(out, local, overwrite=overwrite)
        device = choose_device(recipe.device)
        plan = make_plan(open_source(model, dtype=recipe.dtype), recipe)
        check_output(out, local, overwrite=overwrite, expected_bytes=plan.after_bytes)
        return cls(plan, out, device, overwrite)

    def run(self, command: Sequence[str] = ()) -> Report:
        """Do it; `command` is what report.json gives as the command that was run."""
        return run_plan(
            self.plan,
            load_calibration(self.plan),
            self.out,
            device=self.device,
            overwrite=self.overwrite,
            command=command,
            progress=lambda names, text: progress(names, total=len(names), desc=text),
        )
