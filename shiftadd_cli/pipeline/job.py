"""A run from its arguments: all checks that are possible before the work, then the work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shiftadd_cli.allocation.plan_file import BitPlan
from shiftadd_cli.artifact.output import check_output, check_space
from shiftadd_cli.context import ALONE_ON_CPU, Context
from shiftadd_cli.distributed.team import ALONE, Team
from shiftadd_cli.errors import MemoryLimitError
from shiftadd_cli.pipeline.account import PhaseClock
from shiftadd_cli.pipeline.allocate import AllocationJob, Request
from shiftadd_cli.pipeline.calibration import Calibration
from shiftadd_cli.pipeline.history import RunInputs
from shiftadd_cli.pipeline.plan import Plan, budget_of, least_memory, make_plan
from shiftadd_cli.pipeline.recorder import Recorder, recording
from shiftadd_cli.pipeline.run import Run
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.report.schema import Report
from shiftadd_cli.sizes import parse_size
from shiftadd_cli.source import open_source


@dataclass(frozen=True)
class Job:
    """A planned run; nothing has been written yet.

    overwrite: replace an existing checkpoint. resume: continue an unfinished run, instead of starting over. allocation:
    the job that first chooses the bits of every layer, if the recipe gives their average; `plan` then has the fewest
    possible bits.
    """

    plan: Plan
    out: Path
    context: Context = ALONE_ON_CPU
    overwrite: bool = False
    resume: bool = True
    allocation: AllocationJob | None = None

    @classmethod
    def prepare(
        cls,
        model: str,
        out: Path,
        recipe: Recipe,
        *,
        overwrite: bool = False,
        resume: bool = True,
        max_memory: str | None = None,
        trust_remote_code: bool = False,
        team: Team = ALONE,
    ) -> Job:
        """Plan to compress `model` (hub id, folder, .gguf file or `demo`) into the folder `out`, from headers alone.

        max_memory: upper limit on the memory of the run, such as "4GB"; a run that is expected to need more is refused.
        trust_remote_code: run model code that comes with `model`.
        team: the team of this process; its first process writes.

        Raises ShiftaddError, saying what to do, for every fault that can be detected at this point.
        """
        local = Path(model) if Path(model).exists() else None
        if team.first:
            check_output(out, local, overwrite=overwrite)
        context = Context.of(recipe.device, team)
        source = open_source(model, dtype=recipe.dtype, trust_remote_code=trust_remote_code)
        memory = None if max_memory is None else _memory_limit(max_memory)
        if not recipe.allocates:
            allocation, plan = None, make_plan(source, recipe, memory=memory)
        else:
            request = Request(budget_of(recipe), candidates=recipe.candidates, tie_fused=recipe.tie_fused)
            allocation = AllocationJob.prepare(source, recipe, request, memory=memory, team=team)
            plan = allocation.plan_at(min)
        if max_memory is not None and memory is not None:
            _check_memory(plan, max_memory, memory, plan.held_bytes(team))
        if team.first:
            check_output(out, local, overwrite=overwrite, expected_bytes=plan.most_bytes)
        return cls(plan, out, context, overwrite, resume, allocation)

    def run(self, command: Sequence[str] = (), announce: Callable[[Plan], None] | None = None) -> Report | None:
        """Do the job, or continue an earlier run of it; all processes of the team call this. The first one returns the
        report.

        command: the command recorded in report.json. announce: called with the plan and its chosen bits, if the recipe
        leaves the bits open.

        Raises ResumeError before any work if the unfinished run has other inputs; RecipeError if the options, model,
        text or software of this process differ from those of the first; Interrupted, saying how to resume, if the run
        is stopped; TeamError if another process of the team fails.
        """
        clock = PhaseClock()
        if self.context.team.first:
            check_space(self.out, self.plan.most_bytes + self.plan.state_bytes)
        with clock.phase("calibration"):
            data = Calibration.of(self.plan) if self.allocation is None else self.allocation.data
            calibration = None if data is None else data.draw(self.context.team)
        samples = None if calibration is None else calibration.samples
        with recording(
            self.out,
            self.plan.structure.blocks,
            RunInputs.of(self.plan, samples),
            None if calibration is None else calibration.report(),
            self.context,
            clock,
            resume=self.resume,
            overwrite=self.overwrite,
            command=command,
        ) as recorder:
            plan = self._with_bits(recorder, clock, announce)
            return Run(plan, samples, self.context, recorder, clock).execute()

    def _with_bits(self, recorder: Recorder, clock: PhaseClock, announce: Callable[[Plan], None] | None) -> Plan:
        """The plan with the bits that the allocation chooses, or that an earlier run recorded."""
        if self.allocation is None:
            return self.plan
        known = self.context.team.share("" if recorder.bit_plan is None else recorder.bit_plan.to_json())
        if known:
            bit_plan = BitPlan.model_validate_json(known)
        else:
            with clock.phase("allocate"):
                bit_plan = self.allocation.run()
            recorder.keep_bits(bit_plan)
        # The expected memory stays that of the whole run, since its peak may have been the measuring.
        plan = replace(self.plan.at(bit_plan.choices), bit_plan=bit_plan, peak_memory_bytes=self.plan.peak_memory_bytes)
        if announce is not None:
            announce(plan)
        return plan


def _memory_limit(max_memory: str) -> int:
    limit = parse_size(max_memory)
    if limit is None:
        raise MemoryLimitError(f"`max_memory` {max_memory!r} is not valid; give a size such as 800MB or 4GB.")
    return limit


def _check_memory(plan: Plan, max_memory: str, limit: int, extra: int) -> None:
    """extra: bytes in addition to the plan's own estimate, which smaller batches do not reduce."""
    if plan.peak_memory_bytes + extra <= limit:
        return
    batch_size, least = least_memory(plan, limit - extra)
    least += extra
    expected = _upwards(plan.peak_memory_bytes + extra)
    needs = f"This run is expected to need {expected}, but `max_memory` allows {max_memory}"
    if least > limit:
        raise MemoryLimitError(f"{needs}; the minimum is {_upwards(least)}, with `batch_size=1`.")
    raise MemoryLimitError(f"{needs}; give `batch_size` {batch_size}, which needs {_upwards(least)}.")


def _upwards(count: int) -> str:
    """Bytes in MB, rounded up so that the stated number suffices."""
    return f"{-(-count // 10**6)}MB"
