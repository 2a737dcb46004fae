"""All measurements of the allocation benchmark; each is read from disk, or made and written there."""

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
from shiftadd_cli.bcq.choices import ROWS, bits_of_choice
from shiftadd_cli.bcq.matrix_format import MatrixStorage
from shiftadd_cli.code_fingerprint import code_fingerprint
from shiftadd_cli.errors import AllocationError, RecipeError
from shiftadd_cli.pipeline.allocate import AllocationJob, Request
from shiftadd_cli.pipeline.history import samples_fingerprint
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.source import open_source

SENSITIVITIES: tuple[SensitivityKind, ...] = get_args(SensitivityKind)
# File sizes to request, as parts of the range from the smallest possible size to the largest.
SIZE_PARTS = (1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6)
SOLVER_BLOCKS, SOLVER_CANDIDATES, SOLVER_PARTS = 80, (2, 3, 4, 5), (0.1, 0.25, 0.5, 0.75, 0.9)


@dataclass
class Allocations:
    """A benchmark in the folder `work`.

    Attributes:
        conditions: one for each calibration seed; only the seed differs.
        method: the recipe of all mixes.
        sample_blocks, sample_bits: number of blocks whose layers are replaced alone, for the first seed (see
            `sample_layers`), and the bits of these layers.
        once: sensitivities to measure only for the first seed, because they take very long.
        mixes: set once the sensitivities are known; `bench` then holds their rows, one for mixes with the same bits.
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
        """Check everything that can be checked now. Raises ShiftaddError."""
        if self.method.peer or self.method.has_own_width:
            raise RecipeError(f"{self.method.label} cannot take bits from a plan; give a recipe of ours without bits.")
        if SENSITIVITIES[0] in self.once:
            raise AllocationError(f"--once {SENSITIVITIES[0]}: every seed needs it; give another sensitivity.")
        if self.sample_bits not in self.candidates:
            raise AllocationError(f"--sample-bits {self.sample_bits} is not one of --candidates; give one of them.")
        self.recipes = {conditions.seed: self._recipe(conditions) for conditions in self.conditions}
        self._cells: list[Cell] = []
        self.bench = Bench(self.conditions[0], self._cells, self.work, self.together, self.keep_artifacts, self.say)
        self._jobs: dict[int, AllocationJob] = {}
        for conditions in self.conditions:
            # Also rejects a calibration text that is a test text.
            conditions.cell(self.method, self.sample_bits)
            recipe = self.recipes[conditions.seed]
            request = Request(Budget.parse(max(self.budgets), None), self.candidates)
            job = AllocationJob.prepare(open_source(conditions.model, dtype=recipe.dtype), recipe, request)
            for budget in self.budgets:
                job.with_budget(Budget.parse(budget, None))
            self._jobs[conditions.seed] = job

    def fill(self, finished: Callable[[], None]) -> None:
        """Read or make all parts; calls `finished` after each new part."""
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
        """The measured row of a mix; None if it failed."""
        return self.bench.rows.get(mix.place)

    def _kinds(self, seed: int) -> list[SensitivityKind]:
        first = seed == self.conditions[0].seed
        return [kind for kind in SENSITIVITIES if first or kind not in self.once]

    def _recipe(self, conditions: Conditions) -> Recipe:
        common = {name: getattr(conditions, name) for name in ("calibration", "samples", "seq_len", "seed")}
        # Mixes are of layers, beside embeddings that are all alike.
        return self.method.resolve(self.sample_bits, {**common, "embedding_bits": ROWS})

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
            measured = json.loads(out.read_text(encoding="utf-8"))
            out.unlink()
            return SensitivityRow(settings=settings, machine=machine(), code=code_fingerprint(), **measured)

        return find_or_make(self.work, f"sensitivity {kind}", max(self.candidates), SensitivityRow, settings, make)

    def _settle_mixes(self) -> None:
        self.mixes.clear()
        self._cells.clear()
        indices: dict[str, int] = {}
        for conditions in self.conditions:
            seed = conditions.seed
            job = self._jobs[seed]
            sensitivities = {kind: self.sensitivities[kind, seed].found for kind in self._kinds(seed)}
            for budget in self.budgets:
                plans: dict[str, BitPlan] = {}
                for kind in sensitivities:
                    request = replace(job.request, budget=Budget.parse(budget, None), sensitivity=kind)
                    plans[kind] = replace(job, request=request).choose(sensitivities[kind])
                layers, tied = job.problem(sensitivities[SENSITIVITIES[0]])
                available = Budget.parse(budget, None).layer_bytes(plans[SENSITIVITIES[0]].weights, 0, 0)
                plans[RANDOM] = job.bit_plan(layers, random_bits(layers, tied, available, seed))
                equal = uniform_bits(layers, available)
                if equal is not None:
                    plans[UNIFORM] = job.bit_plan(layers, equal)
                for planner, plan in plans.items():
                    predicted: dict[str, float] = {
                        kind: sum((sensitivity.costs[name][bits] for name, bits in plan.bits.items()), 0.0)
                        for kind, sensitivity in sensitivities.items()
                    }
                    cell = self._cell(plan, conditions)
                    index = indices.setdefault(cell.row_name, len(indices))
                    if index == len(self._cells):
                        self._cells.append(cell)
                    self.mixes.append(Mix(budget, planner, seed, plan, predicted, index))
                    self._write_plan(plan)

    def _plan_path(self, plan: BitPlan) -> Path:
        return self.work / "plans" / f"{fingerprint(dict(plan.bits))[:16]}.json"

    def _write_plan(self, plan: BitPlan) -> None:
        if not self._plan_path(plan).is_file():
            write_text(self._plan_path(plan), plan.to_json())

    def _cell(self, plan: BitPlan, conditions: Conditions) -> Cell:
        """The row of a mix. Its settings hold the bits, not the path or the origin of the plan."""
        label = f"{self.method.label} mix of {plan.planes_per_weight:.3f} planes seed {conditions.seed}"
        overrides = {**self.method.overrides, "bit_plan": str(self._plan_path(plan))}
        cell = conditions.cell(Method(label, self.method.recipe, overrides), _most_bits(plan))
        recipe = {**cell.artifact_settings["recipe"], "bit_plan": fingerprint(dict(plan.bits))}
        settings = {**cell.artifact_settings, "recipe": recipe}
        return replace(cell, artifact_settings=settings, row_settings={**cell.row_settings, "artifact": settings})

    def _alone(self, conditions: Conditions) -> AloneRow:
        job = self._jobs[conditions.seed]
        layers, _ = job.problem(self.sensitivities[SENSITIVITIES[0], conditions.seed].found)
        plan = job.bit_plan(layers, dict.fromkeys((layer.name for layer in layers), self.sample_bits))
        cell = self._cell(plan, conditions)
        names = sample_layers([linear.spec for linear in job.linears], self.sample_blocks)
        test, dataset = next(iter(conditions.tests.items()))
        settings = {**cell.row_settings, "layers": names, "test": test}

        def make() -> AloneRow:
            self.say(f"{len(names)} layers alone, seed {conditions.seed}: quantizing and measuring")
            self._write_plan(plan)
            artifact = make_artifact(cell, conditions.model, self.work)
            losses = losses_alone(
                conditions.model,
                str(artifact),
                names,
                dataset,
                conditions.window,
                conditions.max_tokens,
                conditions.dtype,
            )
            if not self.keep_artifacts and cell.row_name not in {planned.row_name for planned in self._cells}:
                shutil.rmtree(artifact)
            return AloneRow(
                settings=settings, machine=machine(), code=code_fingerprint(), bits=self.sample_bits, kl=losses
            )

        return find_or_make(self.work, "layers alone", self.sample_bits, AloneRow, settings, make)

    def _size(self, part: float) -> SizeRow:
        """A run with a requested size. The fit of the layers does not affect the size, so a fast fit suffices."""
        conditions = self.conditions[0]
        job = self._jobs[conditions.seed]
        recipe = self.recipes[conditions.seed]
        low, high = (job.plan_at(choose).file_bytes for choose in (min, max))
        budget = Budget.parse(None, f"{round(low + part * (high - low)) / 1000:.3f}KB")
        target = budget.file_bytes
        assert target is not None
        fields = (*MatrixStorage.model_fields, "embedding_bits", "skip", "dtype", "shard_size", "seed", "device")
        fast = {name: getattr(recipe, name) for name in fields} | {"fit": "greedy", "fit_rounds": 1}
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
    """The most bits that a layer gets."""
    return max(map(bits_of_choice, plan.bits.values()))
