"""From a model and a budget to a bit plan: sensitivities, measured or remembered, and the best choice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch

from shiftadd_cli.allocation.budget import Budget
from shiftadd_cli.allocation.cache import SensitivityCache
from shiftadd_cli.allocation.cost_table import CostLimit
from shiftadd_cli.allocation.patterns import follow_pins, fused, pinned_bits, tied_by_pattern
from shiftadd_cli.allocation.plan_file import (
    BitPlan,
    Origin,
    PlanCalibration,
    PlannedLayer,
    PlannedModel,
    plan_version,
    round_cost,
)
from shiftadd_cli.allocation.sensitivity import Sensitivities, SensitivityKind, measure_sensitivities
from shiftadd_cli.allocation.solve import LayerOptions, allocate, allocate_smallest, tied_groups
from shiftadd_cli.artifact.shards import plan_shards
from shiftadd_cli.bcq.choices import Choice, ordered_choices
from shiftadd_cli.bcq.matrix_format import MatrixStorage
from shiftadd_cli.bcq.weight import PackedLayout
from shiftadd_cli.blockwise.model import BlockwiseModel
from shiftadd_cli.blockwise.trace import trace_model
from shiftadd_cli.cache import cache_folder
from shiftadd_cli.device import choose_device
from shiftadd_cli.distributed.team import ALONE, Team
from shiftadd_cli.errors import AllocationError
from shiftadd_cli.pipeline.calibration import Calibration, CalibrationSet, samples_fingerprint
from shiftadd_cli.pipeline.plan import Plan, PlannedLinear, make_plan
from shiftadd_cli.progress import BlockProgress
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.source import Source

# Fields of a recipe that no sensitivity depends on; the text goes by the samples drawn from it, whatever it is called.
_IRRELEVANT = (
    "primitive", "bits", "avg_bits", "candidates", "tie_fused", "bit_plan", "refine_rounds", "descent_passes",
    "bias_correction", "true_sequential", "asymmetric", "loss_aware", "reconstruct_epochs", "distill_epochs",
    "embedding_bits", "calibration", "writing_length", "writing_temperature",
    "writing_min_p", "batch_size", "device", "shard_size",
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What is asked: see the options of `shiftadd allocate-bits`.

    Raises AllocationError for a budget in a unit that the sensitivity does not have.
    """

    budget: Budget | CostLimit
    candidates: tuple[Choice, ...] = (2, 3, 4)
    sensitivity: SensitivityKind = "output"
    keep: tuple[str, ...] = ()
    tie: tuple[str, ...] = ()
    tie_fused: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.budget, Budget) and self.budget.divergence is not None and self.sensitivity == "paper":
            raise AllocationError(
                "`max_divergence` is in nats a token, and what `sensitivity=paper` predicts has no unit; use "
                "`sensitivity` output or divergence."
            )


class FrontPoint(NamedTuple):
    """One size and the least loss predicted for it: stored bits per weight, and the unit of the sensitivity."""

    bits_per_weight: float
    predicted_loss: float


@dataclass(frozen=True)
class AllocationJob:
    """An allocation whose request has been checked; nothing has been measured yet.

    `linears` are planned at the recipe's own bits. `data` is drawn when it is needed.
    """

    source: Source
    recipe: Recipe
    request: Request
    linears: tuple[PlannedLinear, ...]
    allowed: dict[str, tuple[Choice, ...]]
    tied: list[tuple[str, ...]]
    data: Calibration
    device: torch.device

    @classmethod
    def prepare(cls, source: Source, recipe: Recipe, request: Request, *, memory: int | None = None) -> AllocationJob:
        """Check everything that can be known from headers and the calibration text.

        Raises ShiftaddError, saying what to do: also for a budget that no choice of bits meets.
        """
        recipe = recipe.model_copy(update={"primitive": "bcq", "bit_plan": None})
        device = choose_device(recipe.device)
        plan = make_plan(source, recipe, memory=memory)
        specs = [each.spec for each in plan.linears]
        pinned = pinned_bits(specs, request.keep)
        allowed = {spec.name: (pinned[spec.name],) if spec.name in pinned else request.candidates for spec in specs}
        tied = tied_groups(allowed, tied_by_pattern(specs, request.tie))
        allowed = follow_pins(allowed, tied)
        words = [choice for each in allowed.values() for choice in each if isinstance(choice, str)]
        if words and request.sensitivity == "paper":
            raise AllocationError(
                f"`sensitivity=paper` knows of bits alone, and not of {words[0]}; use `sensitivity` output or "
                "divergence."
            )
        if not plan.calibrated:
            raise AllocationError(
                "What bits matter to a layer is measured on calibration data; choose a `calibration`, and a recipe "
                "that uses one."
            )
        data = Calibration.of(plan)
        assert data is not None, "the plan is calibrated"
        job = cls(source, plan.recipe, request, plan.linears, allowed, tied, data, device)
        job.check_budget()
        return job

    def check_budget(self) -> None:
        """Refuse a budget that is too small whatever the sensitivities. What may be lost shows only after them."""
        budget = self.request.budget
        if isinstance(budget, CostLimit):
            budget.check(self.allowed, self.shapes)
            return
        if budget.divergence is not None:
            return
        smallest, largest = self.plan_at(min), self.plan_at(max)
        weights = smallest.quantized_weights
        other = file_bytes(smallest) - smallest.quantized_bytes
        if budget.layer_bytes(weights, other) < smallest.quantized_bytes:
            low, high = (budget.in_words(each.quantized_bytes, weights, other) for each in (smallest, largest))
            raise AllocationError(
                f"A budget of {budget.text} cannot be met: the bits allowed take from {low} to {high}; raise it, or "
                "allow fewer bits with `candidates`."
            )

    def run(self, show: BlockProgress, team: Team = ALONE) -> BitPlan:
        """Measure, or remember, the sensitivities, and choose.

        show: wraps the block names, with a description, to show how far it is. team: whose processes share the
        measuring; the first remembers and chooses.

        Raises AllocationError for layers that must and cannot have equal bits, and for a divergence that no bits reach.
        """
        sensitivities = self.sensitivities(show, team)
        return BitPlan.model_validate_json(team.share(self.choose(sensitivities).to_json() if team.first else ""))

    def choose(self, sensitivities: Sensitivities) -> BitPlan:
        """The best plan within the budget for what was measured.

        Raises AllocationError where fused layers are kept at different bits, or leave no choice within the budget, and
        for a divergence that no bits reach.
        """
        layers, tied = self.problem(sensitivities)
        budget = self.request.budget
        if isinstance(budget, CostLimit):
            # Fused layers may have taken the bits of others that are kept.
            budget.check({each.name: tuple(each.bytes) for each in layers}, self.shapes)
            priced = [budget.priced(each, self.shapes[each.name]) for each in layers]
            return self.bit_plan(layers, allocate(priced, tied, budget.steps))
        if budget.divergence is not None:
            return self.bit_plan(layers, allocate_smallest(layers, tied, budget.divergence))
        smallest = self.plan_at(min)
        other = file_bytes(smallest) - smallest.quantized_bytes
        available = budget.layer_bytes(smallest.quantized_weights, other)
        chosen = allocate(layers, tied, available)
        while budget.file_bytes is not None:
            above = file_bytes(self.data.plan.at(chosen)) - budget.file_bytes
            if above <= 0:
                break
            # The files' headers take a few bytes that depend on the choice.
            available = max(available - above, smallest.quantized_bytes)
            chosen = allocate(layers, tied, available)
        return self.bit_plan(layers, chosen)

    def front(self, sensitivities: Sensitivities, points: int = 25) -> list[FrontPoint]:
        """The least predicted loss at evenly spaced sizes, from the fewest bits allowed to the most."""
        layers, tied = self.problem(sensitivities)
        low, high = (sum(choose(each.bytes.values()) for each in layers) for choose in (min, max))
        weights = sum(rows * columns for rows, columns in self.shapes.values())
        found = []
        for budget in sorted({low + (high - low) * step // max(points - 1, 1) for step in range(points)}):
            chosen = allocate(layers, tied, budget)
            stored = sum(each.bytes[chosen[each.name]] for each in layers)
            found.append(FrontPoint(8 * stored / weights, sum(each.costs[chosen[each.name]] for each in layers)))
        return found

    @property
    def running(self) -> Source:
        """The source at the dtype that is computed in."""
        return self.source.computed_on(self.device)

    def with_budget(self, budget: Budget | CostLimit) -> AllocationJob:
        """The same with another budget. Raises AllocationError where it is too small."""
        other = replace(self, request=replace(self.request, budget=budget))
        other.check_budget()
        return other

    def sensitivities(self, show: BlockProgress, team: Team = ALONE) -> Sensitivities:
        """At everything allowed for any layer, from the cache where it has them; in the first process of a team, and in
        the others of what this took to measure."""
        calibration = self.data.draw(team)
        wanted = ordered_choices(choice for each in self.allowed.values() for choice in each)
        cache = SensitivityCache(
            cache_folder(),
            self.request.sensitivity,
            self.source.fingerprint,
            str(self.running.dtype),
            self.recipe_fingerprint,
            # The samples themselves count: another way to draw or read the same data gives other sensitivities.
            samples_fingerprint(calibration.samples),
        )
        kept = cache.load() if team.first else None
        known = next(iter(kept.costs.values())).keys() if kept is not None else set[Choice]()
        missing = team.share([bits for bits in wanted if bits not in known])
        if kept is not None and not missing:
            return kept
        found = self.measure(missing, show, team) if missing else Sensitivities({}, ())
        return cache.keep(found) if team.first else found

    def problem(self, sensitivities: Sensitivities) -> tuple[list[LayerOptions], list[tuple[str, ...]]]:
        """What every layer may be, and the layers that get equal bits."""
        together = fused(sensitivities.shared_inputs) if self.request.tie_fused else []
        tied = tied_groups(self.allowed, [*self.tied, *together])
        return self._choices(sensitivities, follow_pins(self.allowed, tied)), tied

    def _choices(self, sensitivities: Sensitivities, allowed: Mapping[str, tuple[Choice, ...]]) -> list[LayerOptions]:
        """Stored bytes and predicted loss, as the plan will say it, of every layer at the bits allowed for it."""
        found = []
        for spec in (each.spec for each in self.linears):
            layouts = {
                choice: PackedLayout(self.recipe.at(choice), spec.out_features, spec.in_features)
                for choice in allowed[spec.name]
            }
            found.append(
                LayerOptions(
                    spec.name,
                    {bits: layout.nbytes for bits, layout in layouts.items()},
                    {bits: round_cost(sensitivities.costs[spec.name][bits]) for bits in layouts},
                )
            )
        return found

    def plan_at(self, choose: Callable[[Iterable[int]], int]) -> Plan:
        """The run with what stores the bytes that `choose` takes of those allowed for each layer."""
        chosen = {}
        for name, choices in self.allowed.items():
            layouts = {choice: PackedLayout(self.recipe.at(choice), *self.shapes[name]) for choice in reversed(choices)}
            stored = {layout.nbytes: choice for choice, layout in layouts.items()}
            chosen[name] = stored[choose(stored)]
        return self.data.plan.at(chosen)

    @property
    def calibration(self) -> CalibrationSet:
        """The data, which the model writes now if it has not yet."""
        return self.data.draw()

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """`[out, in]` of every layer by name."""
        return {each.spec.name: (each.spec.out_features, each.spec.in_features) for each in self.linears}

    @cached_property
    def recipe_fingerprint(self) -> str:
        """Of the fields that a sensitivity may depend on."""
        return self.recipe.fingerprint(without=_IRRELEVANT)

    def measure(self, candidates: Sequence[Choice], show: BlockProgress, team: Team = ALONE) -> Sensitivities:
        """Sensitivities at these bits, whatever is remembered."""
        source, recipe, samples = self.running, self.recipe, self.calibration.samples
        structure = make_plan(source, recipe).structure
        model = BlockwiseModel(source, structure, self.device)
        with model.outside():
            return measure_sensitivities(
                self.request.sensitivity,
                model,
                samples,
                trace_model(model, samples, recipe.batch_size, progress=show),
                recipe.solver_options,
                candidates,
                seed=recipe.seed,
                progress=show,
                team=team,
            )

    def bit_plan(self, layers: Sequence[LayerOptions], chosen: Mapping[str, Choice]) -> BitPlan:
        """Bits chosen, by name, out of what the layers may be, with what they were decided on."""
        request, samples = self.request, self.calibration.samples
        planned = {
            each.name: PlannedLayer(
                bits=chosen[each.name], shape=self.shapes[each.name], bytes=dict(each.bytes), cost=dict(each.costs)
            )
            for each in layers
        }
        return BitPlan(
            version=plan_version(planned.values()),
            model=PlannedModel(name=self.source.name, fingerprint=self.source.fingerprint),
            storage=self.recipe.part(MatrixStorage),
            made_by=Origin(
                sensitivity=request.sensitivity,
                recipe_fingerprint=self.recipe_fingerprint,
                calibration=PlanCalibration(
                    name=self.calibration.name,
                    fingerprint=self.calibration.fingerprint,
                    samples=len(samples),
                    seq_len=None if self.source.reads_images else samples.shape[1],
                    window_start=self.calibration.window_start,
                ),
                budget=request.budget.text,
                keep=request.keep,
                tie=request.tie,
                tie_fused=request.tie_fused,
            ),
            layers=planned,
        )


def file_bytes(plan: Plan) -> int:
    """Size of the weight files of a run, headers included."""
    return sum(shard.nbytes for shard in plan_shards(plan.tensors, plan.recipe.shard_bytes))
