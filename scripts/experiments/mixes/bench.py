"""Everything the benchmark of allocation measures, each part found on disk or made and written there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

import yaml

from experiments.mixes.alone import losses_alone, sample_layers
from experiments.mixes.planning import RANDOM, UNIFORM, Mix, random_bits, uniform_bits
from experiments.mixes.solver import solver_seconds, synthetic_layers
from experiments.mixes.stored import AloneRow, SensitivityRow, SizeRow, SolverRow, find_or_make
from experiments.quality.bench import Bench
from experiments.quality.conditions import Cell, Conditions, machine, versions
from experiments.quality.making import make_artifact, run_logged
from experiments.quality.methods import Method
from experiments.quality.rows import Row, file_name, fingerprint, write_text
from shiftadd_cli.allocation.budget import Budget
from shiftadd_cli.allocation.cache import CACHE_VERSIONS
from shiftadd_cli.allocation.plan_file import BitPlan
from shiftadd_cli.allocation.sensitivity import SensitivityKind
from shiftadd_cli.bcq.choices import bits_of_choice
from shiftadd_cli.bcq.matrix_format import MatrixStorage
from shiftadd_cli.code_fingerprint import code_fingerprint
from shiftadd_cli.errors import AllocationError, RecipeError
from shiftadd_cli.pipeline.allocate import AllocationJob, Request, file_bytes
from shiftadd_cli.pipeline.history import samples_fingerprint
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.source import open_source

SENSITIVITIES: tuple[SensitivityKind, ...] = get_args(SensitivityKind)
# Sizes of files to ask for, as parts of the way from the smallest there can be to the largest.
SIZE_PARTS = (1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6)
SOLVER_BLOCKS, SOLVER_CANDIDATES, SOLVER_PARTS = 80, (2, 3, 4, 5), (0.1, 0.25, 0.5, 0.75, 0.9)


@dataclass
class Allocations:
    """A benchmark in the folder `work`.

    Attributes:
        conditions: of each calibration seed, alike but for the seed.
        method: the recipe that all mixes are made with.
        sample_blocks, sample_bits: layers that are replaced alone (those of the first seed), see `sample_layers`, and
            their bits.
        once: sensitivities of the first seed alone, for those that take very long.
        mixes: settled once sensitivities are there; `bench` then holds their rows, those of equal bits once.
    """

    conditions: Sequence[Conditions]
    method: Method
    budgets: Sequence[float]
    candidates: tuple[int, ...]
    sample_blocks: int
    sample_bits: int
    work: Path
    together: int = 1
    keep_artifacts: bool = False
    say: Callable[[str], None] = print
    once: tuple[SensitivityKind, ...] = ()
    sensitivities: dict[tuple[str, int], SensitivityRow] = field(default_factory=dict)
    alone: AloneRow | None = None
    mixes: list[Mix] = field(default_factory=list)
    sizes: list[SizeRow] = field(default_factory=list)
    solver: SolverRow | None = None

    def __post_init__(self) -> None:
        """Check everything that can be known now. Raises ShiftaddError."""
        if self.method.peer or self.method.has_own_width:
            raise RecipeError(f"{self.method.label} cannot get bits of a plan; give a recipe of ours without bits.")
        if SENSITIVITIES[0] in self.once:
            raise AllocationError(f"--once {SENSITIVITIES[0]}: every seed needs it; give another sensitivity.")
        if self.sample_bits not in self.candidates:
            raise AllocationError(f"--sample-bits {self.sample_bits} is none of --candidates; give one of them.")
        self.recipes = {each.seed: self._recipe(each) for each in self.conditions}
        self._cells: list[Cell] = []
        self.bench = Bench(self.conditions[0], self._cells, self.work, self.together, self.keep_artifacts, self.say)
        self._jobs: dict[int, AllocationJob] = {}
        for each in self.conditions:
            # Also refuses a calibration text that is a test.
            each.cell(self.method, self.sample_bits)
            recipe = self.recipes[each.seed]
            request = Request(Budget.parse(max(self.budgets), None), self.candidates)
            job = AllocationJob.prepare(open_source(each.model, dtype=recipe.dtype), recipe, request)
            for budget in self.budgets:
                job.with_budget(Budget.parse(budget, None))
            self._jobs[each.seed] = job

    def fill(self, finished: Callable[[], None]) -> None:
        """Find or make all parts; `finished` is called whenever something is new."""
        for seed in self._jobs:
            for kind in self._kinds(seed):
                self.sensitivities[kind, seed] = self._sensitivity(kind, seed)
        self._settle_mixes()
        self.solver = self._solver()
        finished()
        self.alone = self._alone(self.conditions[0])
        finished()
        self.bench.fill(finished)
        for part in SIZE_PARTS:
            self.sizes.append(self._size(part))
            finished()

    def row(self, mix: Mix) -> Row | None:
        """What was measured of a mix; None if that failed."""
        return self.bench.rows.get(mix.place)

    def _kinds(self, seed: int) -> list[SensitivityKind]:
        first = seed == self.conditions[0].seed
        return [kind for kind in SENSITIVITIES if first or kind not in self.once]

    def _recipe(self, conditions: Conditions) -> Recipe:
        common = {name: getattr(conditions, name) for name in ("calibration", "samples", "seq_len", "seed")}
        return self.method.resolve(self.sample_bits, common)

    def _sensitivity(self, kind: SensitivityKind, seed: int) -> SensitivityRow:
        job = self._jobs[seed]
        settings = {
            "sensitivity": kind,
            "model": job.source.fingerprint,
            "recipe": job.recipe_fingerprint,
            "calibration": samples_fingerprint(job.calibration.samples),
            "candidates": list(self.candidates),
            "version": CACHE_VERSIONS[kind],
            "versions": versions(),
        }

        def make() -> SensitivityRow:
            self.say(f"sensitivity {kind}, seed {seed}: measuring")
            name = file_name(f"sensitivity {kind}", max(self.candidates), settings)
            recipe, out = self.work / "recipes" / f"{name}.yaml", self.work / "measured" / f"{name}.json"
            write_text(recipe, yaml.safe_dump(self.recipes[seed].model_dump(mode="json"), sort_keys=False))
            candidates = ",".join(map(str, self.candidates))
            module = ["-m", "experiments.mixes.measure_run", job.source.spec, str(recipe), kind, candidates, str(out)]
            run_logged(module, self.work / "logs" / f"{name}.log")
            told = json.loads(out.read_text(encoding="utf-8"))
            out.unlink()
            return SensitivityRow(settings=settings, machine=machine(), code=code_fingerprint(), **told)

        return find_or_make(self.work, f"sensitivity {kind}", max(self.candidates), SensitivityRow, settings, make)

    def _settle_mixes(self) -> None:
        self.mixes.clear()
        self._cells.clear()
        places: dict[str, int] = {}
        for conditions in self.conditions:
            seed = conditions.seed
            job = self._jobs[seed]
            found = {kind: self.sensitivities[kind, seed].found for kind in self._kinds(seed)}
            for budget in self.budgets:
                plans: dict[str, BitPlan] = {}
                for kind in found:
                    request = replace(job.request, budget=Budget.parse(budget, None), sensitivity=kind)
                    plans[kind] = replace(job, request=request).choose(found[kind])
                layers, tied = job.problem(found[SENSITIVITIES[0]])
                available = Budget.parse(budget, None).layer_bytes(plans[SENSITIVITIES[0]].weights, 0)
                plans[RANDOM] = job.bit_plan(layers, random_bits(layers, tied, available, seed))
                equal = uniform_bits(layers, available)
                if equal is not None:
                    plans[UNIFORM] = job.bit_plan(layers, equal)
                for planner, plan in plans.items():
                    predicted: dict[str, float] = {
                        kind: sum((each.costs[name][bits] for name, bits in plan.bits.items()), 0.0)
                        for kind, each in found.items()
                    }
                    cell = self._cell(plan, conditions)
                    place = places.setdefault(cell.row_name, len(places))
                    if place == len(self._cells):
                        self._cells.append(cell)
                    self.mixes.append(Mix(budget, planner, seed, plan, predicted, place))
                    self._write_plan(plan)

    def _plan_path(self, plan: BitPlan) -> Path:
        return self.work / "plans" / f"{fingerprint(dict(plan.bits))[:16]}.json"

    def _write_plan(self, plan: BitPlan) -> None:
        if not self._plan_path(plan).is_file():
            write_text(self._plan_path(plan), plan.to_json())

    def _cell(self, plan: BitPlan, conditions: Conditions) -> Cell:
        """The row of a mix: its settings hold the bits and not where, or why, the plan was written."""
        label = f"{self.method.label} mix of {plan.planes_per_weight:.3f} planes seed {conditions.seed}"
        overrides = {**self.method.overrides, "bit_plan": str(self._plan_path(plan))}
        cell = conditions.cell(Method(label, self.method.recipe, overrides), _most_bits(plan))
        recipe = {**cell.artifact_settings["recipe"], "bit_plan": fingerprint(dict(plan.bits))}
        made = {**cell.artifact_settings, "recipe": recipe}
        return replace(cell, artifact_settings=made, row_settings={**cell.row_settings, "artifact": made})

    def _alone(self, conditions: Conditions) -> AloneRow:
        job = self._jobs[conditions.seed]
        layers, _ = job.problem(self.sensitivities[SENSITIVITIES[0], conditions.seed].found)
        plan = job.bit_plan(layers, dict.fromkeys((layer.name for layer in layers), self.sample_bits))
        cell = self._cell(plan, conditions)
        names = sample_layers([each.spec for each in job.linears], self.sample_blocks)
        test, dataset = next(iter(conditions.tests.items()))
        settings = {**cell.row_settings, "layers": names, "test": test}

        def make() -> AloneRow:
            self.say(f"{len(names)} layers alone, seed {conditions.seed}: quantizing and measuring")
            self._write_plan(plan)
            artifact = make_artifact(cell, conditions.model, self.work)
            found = losses_alone(
                conditions.model,
                str(artifact),
                names,
                dataset,
                conditions.window,
                conditions.max_tokens,
                conditions.dtype,
            )
            if not self.keep_artifacts and cell.row_name not in {each.row_name for each in self._cells}:
                shutil.rmtree(artifact)
            return AloneRow(
                settings=settings, machine=machine(), code=code_fingerprint(), bits=self.sample_bits, kl=found
            )

        return find_or_make(self.work, "layers alone", self.sample_bits, AloneRow, settings, make)

    def _size(self, part: float) -> SizeRow:
        """A run that is asked for a size; how well its layers are fitted has no part in it, so that is done fast."""
        conditions = self.conditions[0]
        job = self._jobs[conditions.seed]
        recipe = self.recipes[conditions.seed]
        low, high = (file_bytes(job.plan_at(choose)) for choose in (min, max))
        budget = Budget.parse(None, f"{round(low + part * (high - low)) / 1000:.3f}KB")
        target = budget.file_bytes
        assert target is not None
        kept = (*MatrixStorage.model_fields, "embedding_bits", "skip", "dtype", "shard_size", "seed", "device")
        fast = {name: getattr(recipe, name) for name in kept} | {"fit": "greedy", "fit_rounds": 1}
        plan = job.with_budget(budget).choose(self.sensitivities[SENSITIVITIES[0], conditions.seed].found)
        label = f"size {target}"
        method = Method(label, "fast", {**fast, "bit_plan": str(self._plan_path(plan))})
        settings = {
            "model": conditions.model_fingerprint,
            "recipe": {name: str(value) for name, value in fast.items()},
            "bits": fingerprint(dict(plan.bits)),
            "target": target,
            "versions": versions(),
        }

        def make() -> SizeRow:
            self.say(f"{label} bytes: quantizing")
            self._write_plan(plan)
            bits = _most_bits(plan)
            cell = Cell(method, bits, method.resolve(bits, {}), settings, {})
            artifact = make_artifact(cell, conditions.model, self.work)
            stored = sum(file.stat().st_size for file in artifact.glob("*.safetensors"))
            if not self.keep_artifacts:
                shutil.rmtree(artifact)
            return SizeRow(
                settings=settings, machine=machine(), code=code_fingerprint(), target_bytes=target, file_bytes=stored
            )

        return find_or_make(self.work, label, max(self.candidates), SizeRow, settings, make)

    def _solver(self) -> SolverRow:
        settings = {
            "blocks": SOLVER_BLOCKS,
            "candidates": list(SOLVER_CANDIDATES),
            "parts": list(SOLVER_PARTS),
            "versions": versions(),
        }

        def make() -> SolverRow:
            layers = synthetic_layers(SOLVER_BLOCKS, SOLVER_CANDIDATES)
            return SolverRow(
                settings=settings,
                machine=machine(),
                code=code_fingerprint(),
                blocks=SOLVER_BLOCKS,
                linears=len(layers),
                candidates=len(SOLVER_CANDIDATES),
                seconds=solver_seconds(layers, SOLVER_PARTS),
            )

        return find_or_make(self.work, "solver", max(SOLVER_CANDIDATES), SolverRow, settings, make)


def _most_bits(plan: BitPlan) -> int:
    """Bits of the layer that gets most."""
    return max(map(bits_of_choice, plan.bits.values()))
