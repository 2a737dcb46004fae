"""From a model and a budget to a bit plan: sensitivities, measured or cached, and the best choice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

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
from shiftadd_cli.bcq.choices import Choice, ordered_choices
from shiftadd_cli.bcq.matrix_format import MatrixStorage
from shiftadd_cli.bcq.table_layout import TableLayout
from shiftadd_cli.bcq.weight import PackedLayout
from shiftadd_cli.blockwise.model import BlockwiseModel
from shiftadd_cli.blockwise.trace import trace_model
from shiftadd_cli.cache import cache_folder
from shiftadd_cli.calibration.hessian import sufficient_tokens
from shiftadd_cli.context import Context
from shiftadd_cli.distributed.team import ALONE, Team
from shiftadd_cli.errors import AllocationError
from shiftadd_cli.pipeline.calibration import Calibration, CalibrationSet, samples_fingerprint
from shiftadd_cli.pipeline.plan import Plan, PlannedLinear, make_plan
from shiftadd_cli.pipeline.table_bits import measure_tables
from shiftadd_cli.pipeline.tables import PlannedTable
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.source import Source

# Recipe fields that no sensitivity depends on. The text is identified by the samples drawn from it, not by its name.
_IRRELEVANT = (
    "primitive", "bits", "avg_bits", "avg_file_bits", "target_size", "candidates", "tie_fused", "bit_plan",
    "refine_rounds", "descent_passes",
    "bias_correction", "true_sequential", "asymmetric", "drift", "loss_aware", "reconstruct_epochs", "distill_epochs",
    "embedding_bits", "calibration", "writing_length", "writing_temperature",
    "writing_min_p", "batch_size", "device", "shard_size",
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """A request for a bit plan: see the options of `shiftadd allocate-bits`.

    Raises AllocationError for a budget in a unit that does not fit the sensitivity.
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
                "`max_divergence` is in nats per token, but the predictions of `sensitivity=paper` have no unit; use "
                "`sensitivity` output or divergence."
            )


class FrontPoint(NamedTuple):
    """A size in stored bits per weight, and the least predicted loss at it, in the unit of the sensitivity."""

    bits_per_weight: float
    predicted_loss: float


@dataclass(frozen=True)
class AllocationJob:
    """An allocation with a checked request; nothing has been measured yet.

    `linears` are planned at the recipe's own bits. `tables` are those whose form is chosen too. `data` is drawn on
    demand.
    """

    source: Source
    recipe: Recipe
    request: Request
    linears: tuple[PlannedLinear, ...]
    allowed: dict[str, tuple[Choice, ...]]
    tied: list[tuple[str, ...]]
    data: Calibration
    context: Context
    tables: tuple[PlannedTable, ...] = ()

    @classmethod
    def prepare(
        cls, source: Source, recipe: Recipe, request: Request, *, memory: int | None = None, team: Team = ALONE
    ) -> AllocationJob:
        """Check everything that headers and the calibration text reveal.

        team: its processes share the measuring; the first one reads the cache and chooses.

        Raises ShiftaddError, saying what to do, also for a budget that no choice of bits meets.
        """
        recipe = recipe.model_copy(update={"primitive": "bcq", "bit_plan": None})
        plan = make_plan(source, recipe, memory=memory)
        specs = [linear.spec for linear in plan.linears]
        pinned = pinned_bits(specs, request.keep)
        allowed = {spec.name: (pinned[spec.name],) if spec.name in pinned else request.candidates for spec in specs}
        tied = tied_groups(allowed, tied_by_pattern(specs, request.tie))
        allowed = follow_pins(allowed, tied)
        words = [choice for choices in allowed.values() for choice in choices if isinstance(choice, str)]
        if words and request.sensitivity == "paper":
            raise AllocationError(
                f"`sensitivity=paper` supports only numbers of bits, not {words[0]}; use `sensitivity` output or "
                "divergence."
            )
        if not plan.calibrated:
            raise AllocationError(
                "Sensitivities are measured on calibration data; choose a `calibration`, and a recipe that uses one."
            )
        data = Calibration.of(plan)
        assert data is not None, "the plan is calibrated"
        # Neither the criterion of the paper nor a table of costs has embeddings.
        known = request.sensitivity != "paper" and isinstance(request.budget, Budget)
        tables = plan.tables if recipe.open_tables and known else ()
        context = Context.of(recipe.device, team)
        job = cls(source, plan.recipe, request, plan.linears, allowed, tied, data, context, tables)
        job.check_budget()
        return job

    def check_budget(self) -> None:
        """Refuse a budget that is too small in any case. A loss budget can only be checked after measuring."""
        budget = self.request.budget
        if isinstance(budget, CostLimit):
            budget.check(self.allowed, self.shapes)
            return
        if budget.divergence is not None:
            return
        smallest, largest = self.plan_at(min), self.plan_at(max)
        weights = smallest.quantized_weights
        other = smallest.file_bytes - self._chosen_bytes(smallest)
        sizes = weights, other, smallest.parameters
        if budget.layer_bytes(*sizes) < self._chosen_bytes(smallest):
            low, high = (budget.in_words(self._chosen_bytes(plan), *sizes) for plan in (smallest, largest))
            raise AllocationError(
                f"A budget of {budget.text} cannot be met: the allowed bits take from {low} to {high}; raise it, or "
                "allow fewer bits with `candidates`."
            )

    def _chosen_bytes(self, plan: Plan) -> int:
        """Bytes of a plan that the budget limits: those of the layers, and in a budget of the file those of tables."""
        if isinstance(self.request.budget, Budget) and self.request.budget.average_bits is not None:
            return plan.quantized_bytes
        names = {table.name for table in self.tables}
        return plan.quantized_bytes + sum(table.nbytes for table in plan.tables if table.name in names)

    def run(self) -> BitPlan:
        """Measure the sensitivities, or load them from the cache, and choose the bits.

        Raises AllocationError for layers that must but cannot have equal bits, and for a divergence that no bits reach.
        """
        sensitivities, team = self.sensitivities(), self.context.team
        return BitPlan.model_validate_json(team.share(self.choose(sensitivities).to_json() if team.first else ""))

    def choose(self, sensitivities: Sensitivities) -> BitPlan:
        """The best plan within the budget, given the sensitivities.

        Raises AllocationError if fused layers are kept at different bits, or leave no choice within the budget, and for
        a divergence that no bits reach.
        """
        layers, tied = self.problem(sensitivities)
        budget = self.request.budget
        if isinstance(budget, CostLimit):
            # Fused layers may have taken the bits of pinned layers.
            budget.check({layer.name: tuple(layer.bytes) for layer in layers}, self.shapes)
            priced = [budget.priced(layer, self.shapes[layer.name]) for layer in layers]
            return self.bit_plan(layers, allocate(priced, tied, budget.steps))
        tables = self._table_options(sensitivities)
        if budget.divergence is not None:
            chosen = allocate_smallest([*layers, *tables], tied, budget.divergence)
            return self.bit_plan(layers, chosen, tables)
        smallest = self.plan_at(min)
        other = smallest.file_bytes - self._chosen_bytes(smallest)
        available = budget.layer_bytes(smallest.quantized_weights, other, smallest.parameters)
        if budget.average_bits is not None:
            chosen = allocate(layers, tied, available)
            price = _price(layers, tied, available)
            return self.bit_plan(layers, chosen | {table.name: _cheapest(table, price) for table in tables}, tables)
        layers_and_tables = [*layers, *tables]
        chosen = allocate(layers_and_tables, tied, available)
        while (limit := budget.file_limit(smallest.parameters)) is not None:
            above = self.data.plan.at(chosen).file_bytes - limit
            if above <= 0:
                break
            # The size of the file headers depends slightly on the choice.
            available = max(available - above, self._chosen_bytes(smallest))
            chosen = allocate(layers_and_tables, tied, available)
        return self.bit_plan(layers, chosen, tables)

    def front(self, sensitivities: Sensitivities, points: int = 25) -> list[FrontPoint]:
        """The least predicted loss at evenly spaced sizes, from the fewest allowed bits to the most."""
        layers, tied = self.problem(sensitivities)
        low, high = (sum(choose(layer.bytes.values()) for layer in layers) for choose in (min, max))
        weights = sum(rows * columns for rows, columns in self.shapes.values())
        front = []
        for budget in sorted({low + (high - low) * step // max(points - 1, 1) for step in range(points)}):
            chosen = allocate(layers, tied, budget)
            stored = sum(layer.bytes[chosen[layer.name]] for layer in layers)
            front.append(FrontPoint(8 * stored / weights, sum(layer.costs[chosen[layer.name]] for layer in layers)))
        return front

    @property
    def model(self) -> BlockwiseModel:
        """The model to measure, in the compute dtype."""
        return BlockwiseModel(self.data.plan.running, self.data.plan.structure, self.context)

    def with_budget(self, budget: Budget | CostLimit) -> AllocationJob:
        """The same job with another budget. Raises AllocationError if it is too small."""
        other = replace(self, request=replace(self.request, budget=budget))
        other.check_budget()
        return other

    def sensitivities(self) -> Sensitivities:
        """Sensitivities at all choices allowed for any layer, cached or measured. In the processes of a team other than
        the first, only the newly measured ones."""
        required = ordered_choices(choice for choices in self.allowed.values() for choice in choices)
        layers = self._cached(required, self.measure, self.stride, tables=False)
        if not self.tables:
            return layers
        tables = self._cached(self.recipe.table_candidates, self.measure_tables, 1, tables=True)
        return replace(layers, tables=tables.costs)

    @cached_property
    def stride(self) -> int:
        """Layers are measured on every so many calibration samples. An estimate needs no more than enough for the
        second moments of their inputs."""
        if self.request.sensitivity != "output":
            return 1
        samples, read = self.recipe.samples, self.data.plan.tokens_read
        specs = (linear.spec for linear in self.linears)
        return max(1, min(int(samples * read[spec.name] / sufficient_tokens(spec.in_features)) for spec in specs))

    def _cached(
        self,
        required: Sequence[Choice],
        measure: Callable[[Sequence[Choice]], Sensitivities],
        stride: int,
        *,
        tables: bool,
    ) -> Sensitivities:
        """The cached sensitivities at all these choices; `measure` gives those that are missing, by every `stride`-th
        sample."""
        team = self.context.team
        calibration = self.data.draw(team)
        cache = SensitivityCache(
            cache_folder(),
            self.request.sensitivity,
            self.source.fingerprint,
            str(self.data.plan.running.dtype),
            self.recipe_fingerprint,
            # The samples themselves: another way to draw or read the same data gives other sensitivities.
            samples_fingerprint(calibration.samples[::stride]),
            tables=tables,
        )
        cached = cache.load() if team.first else None
        available = next(iter(cached.costs.values())).keys() if cached is not None else set[Choice]()
        missing = team.share([bits for bits in required if bits not in available])
        if cached is not None and not missing:
            return cached
        measured = measure(missing) if missing else Sensitivities({}, ())
        return cache.keep(measured) if team.first else measured

    def problem(self, sensitivities: Sensitivities) -> tuple[list[LayerOptions], list[tuple[str, ...]]]:
        """The options of every layer, and the groups of layers that get equal bits."""
        together = fused(sensitivities.shared_inputs) if self.request.tie_fused else []
        tied = tied_groups(self.allowed, [*self.tied, *together])
        return self._choices(sensitivities, follow_pins(self.allowed, tied)), tied

    def _choices(self, sensitivities: Sensitivities, allowed: Mapping[str, tuple[Choice, ...]]) -> list[LayerOptions]:
        """Stored bytes and predicted loss, rounded as in the plan, of every layer at its allowed bits."""
        options = []
        for spec in (linear.spec for linear in self.linears):
            layouts = {
                choice: PackedLayout(self.recipe.at(choice), spec.out_features, spec.in_features)
                for choice in allowed[spec.name]
            }
            options.append(_options(spec.name, layouts, sensitivities.costs))
        return options

    def _table_options(self, sensitivities: Sensitivities) -> list[LayerOptions]:
        """The options of every table."""
        options = []
        for table in self.tables:
            forms = {choice: table.at(choice, self.recipe).layout for choice in self.recipe.table_candidates}
            options.append(_options(table.name, forms, sensitivities.tables))
        return options

    def plan_at(self, choose: Callable[[Iterable[int]], int]) -> Plan:
        """The run in which `choose` picks each layer's bytes (`min` or `max`) among its allowed choices."""
        chosen = {}
        for name, choices in self.allowed.items():
            layouts = {choice: PackedLayout(self.recipe.at(choice), *self.shapes[name]) for choice in reversed(choices)}
            stored = {layout.nbytes: choice for choice, layout in layouts.items()}
            chosen[name] = stored[choose(stored)]
        for table in self.tables:
            forms = {table.at(choice, self.recipe).nbytes: choice for choice in self.recipe.table_candidates}
            chosen[table.name] = forms[choose(forms)]
        return self.data.plan.at(chosen)

    @property
    def calibration(self) -> CalibrationSet:
        """The calibration data; if the model has yet to write it, it does so now."""
        return self.data.draw()

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """`[out, in]` of every layer by name."""
        return {linear.spec.name: (linear.spec.out_features, linear.spec.in_features) for linear in self.linears}

    @cached_property
    def recipe_fingerprint(self) -> str:
        """Fingerprint of the fields that a sensitivity may depend on."""
        return self.recipe.fingerprint(without=_IRRELEVANT)

    def measure(self, candidates: Sequence[Choice]) -> Sensitivities:
        """Sensitivities at these bits, measured without the cache."""
        model, recipe, samples = self.model, self.recipe, self.calibration.samples[:: self.stride]
        with model.outside():
            return measure_sensitivities(
                self.request.sensitivity,
                model,
                samples,
                trace_model(model, samples, recipe.batch_size),
                recipe.solver_options,
                candidates,
                seed=recipe.seed,
            )

    def measure_tables(self, candidates: Sequence[Choice]) -> Sensitivities:
        """The same for the tables, whose losses are its `costs`."""
        model, samples, every_form = self.model, self.calibration.samples, self.request.sensitivity == "divergence"
        with model.outside():
            costs = measure_tables(model, samples, self.tables, self.recipe, candidates, every_form=every_form)
        return Sensitivities(costs, ())

    def bit_plan(
        self, layers: Sequence[LayerOptions], chosen: Mapping[str, Choice], tables: Sequence[LayerOptions] = ()
    ) -> BitPlan:
        """The plan file for the chosen bits, by name of the layer or table, with the inputs of the choice."""
        request, samples = self.request, self.calibration.samples
        shapes = self.shapes | {table.name: (table.layout.rows, table.layout.columns) for table in self.tables}
        planned, planned_tables = (
            {
                layer.name: PlannedLayer(
                    bits=chosen[layer.name], shape=shapes[layer.name], bytes=dict(layer.bytes), cost=dict(layer.costs)
                )
                for layer in part
            }
            for part in (layers, tables)
        )
        return BitPlan(
            version=plan_version(planned.values(), tables=bool(tables)),
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
            tables=planned_tables,
        )


def _options(
    name: str, layouts: Mapping[Choice, PackedLayout | TableLayout], costs: Mapping[str, Mapping[Choice, float]]
) -> LayerOptions:
    """The options of a layer or table, given its layout in each form."""
    return LayerOptions(
        name,
        {choice: layout.nbytes for choice, layout in layouts.items()},
        {choice: round_cost(costs[name][choice]) for choice in layouts},
    )


def _price(layers: Sequence[LayerOptions], tied: Sequence[tuple[str, ...]], budget: int) -> float:
    """The loss that a byte saves in the layers at this budget of theirs, over a tenth of it."""
    smallest = sum(min(layer.bytes.values()) for layer in layers)
    sizes, losses = [], []
    for limit in (max(budget - budget // 20, smallest), budget + budget // 20):
        chosen = allocate(layers, tied, limit)
        sizes.append(sum(layer.bytes[chosen[layer.name]] for layer in layers))
        losses.append(math.fsum(layer.costs[chosen[layer.name]] for layer in layers))
    return (losses[0] - losses[1]) / (sizes[1] - sizes[0]) if sizes[1] > sizes[0] else 0.0


def _cheapest(table: LayerOptions, price: float) -> Choice:
    """The form of a table with the least loss, where a byte costs `price`; of equal ones, the smallest."""
    return min(table.bytes, key=lambda choice: (table.costs[choice] + price * table.bytes[choice], table.bytes[choice]))
