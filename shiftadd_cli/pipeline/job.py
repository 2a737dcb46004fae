"""A run from its arguments: every check that can be made before the work, then the work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from shiftadd_cli.allocation.budget import Budget
from shiftadd_cli.artifact.output import check_output
from shiftadd_cli.device import choose_device
from shiftadd_cli.pipeline.account import Measured
from shiftadd_cli.pipeline.allocate import AllocationJob, Request
from shiftadd_cli.pipeline.plan import Plan, make_plan
from shiftadd_cli.pipeline.run import load_calibration, run_plan
from shiftadd_cli.progress import block_bar
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.report.schema import Report
from shiftadd_cli.source import open_source


@dataclass(frozen=True)
class Job:
    """A planned run; nothing has been written yet.

    allocation: what will choose the bits of every layer first, where the recipe gives an average of them; `plan` then
    has the fewest bits there can be.
    """

    plan: Plan
    out: Path
    device: torch.device
    overwrite: bool
    allocation: AllocationJob | None = None

    @classmethod
    def prepare(cls, model: str, out: Path, recipe: Recipe, *, overwrite: bool = False) -> Job:
        """Plan to compress `model` (hub id, folder, .gguf file or `demo`) into the folder `out`, from headers alone.

        Raises ShiftaddError, saying what to do, for everything that can be known to be wrong now.
        """
        local = Path(model) if Path(model).exists() else None
        check_output(out, local, overwrite=overwrite)
        device = choose_device(recipe.device)
        source = open_source(model, dtype=recipe.dtype)
        if recipe.avg_bits is None:
            allocation, plan = None, make_plan(source, recipe)
        else:
            request = Request(
                Budget.parse(recipe.avg_bits, None), candidates=recipe.candidates, tie_fused=recipe.tie_fused
            )
            allocation = AllocationJob.prepare(source, recipe, request)
            plan = allocation.plan_at(min)
        check_output(out, local, overwrite=overwrite, expected_bytes=plan.after_bytes)
        return cls(plan, out, device, overwrite, allocation)

    def run(self, command: Sequence[str] = (), announce: Callable[[Plan], None] | None = None) -> Report:
        """Do it; `command` is what report.json gives as the command that was run.

        announce: told the plan with the bits that were chosen, where the recipe leaves them to be.
        """
        plan, clock = self.plan, Measured()
        if self.allocation is None:
            calibration = load_calibration(plan)
        else:
            calibration = self.allocation.calibration
            with clock.phase("allocate"):
                bit_plan = self.allocation.run(block_bar)
            plan = replace(make_plan(plan.source, plan.recipe, bit_plan.bits), bit_plan=bit_plan)
            if announce is not None:
                announce(plan)
        return run_plan(
            plan,
            calibration,
            self.out,
            device=self.device,
            overwrite=self.overwrite,
            command=command,
            progress=block_bar,
            clock=clock,
        )
