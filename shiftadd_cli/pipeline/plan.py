"""The plan of a run, made before any weight is read: its layers and their storage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import nn

from shiftadd_cli.allocation.budget import Budget
from shiftadd_cli.allocation.plan_file import BitPlan, load_plan
from shiftadd_cli.artifact.format import ArtifactFormat
from shiftadd_cli.artifact.shards import TensorShape, nbytes, plan_shards
from shiftadd_cli.bcq.choices import Choice
from shiftadd_cli.bcq.matrix_format import MatrixStorage
from shiftadd_cli.bcq.weight import PackedLayout
from shiftadd_cli.blockwise.flow import Flow, measure_flow
from shiftadd_cli.device import choose_device
from shiftadd_cli.distributed.team import Team
from shiftadd_cli.errors import SourceError
from shiftadd_cli.pipeline.memory import machine_memory, peak_memory, token_weight_bytes, versions_kept
from shiftadd_cli.pipeline.tables import PlannedTable, plan_tables
from shiftadd_cli.recipe import NO_CALIBRATION, Recipe
from shiftadd_cli.self_text.write import why_not, without_self, written_by_model
from shiftadd_cli.source import LinearSpec, Source, Structure, find_structure
from shiftadd_cli.source.experts import has_split_experts, routed_shares
from shiftadd_cli.source.positions import position_limit, window_length
from shiftadd_cli.source.tokenizer import leading_tokens, tokens_as_text


@dataclass(frozen=True)
class PlannedLinear:
    """One linear and its storage layout."""

    spec: LinearSpec
    layout: PackedLayout


@dataclass(frozen=True)
class Plan:
    """The fixed plan of a run. `source` is the model as it will be stored, `running` the same model in the compute
    dtype; `tensors` are all tensors of the artifact in file order; `kept` are those stored unquantized, and
    `kept_modules` their modules, each with the reason; `tables` are the compressed embeddings and heads; `bit_plan` is
    the source of the bits, if any. `not_written` says why the model cannot write its own calibration text, so that the
    recipe has the builtin text instead; None if it can, or if the recipe does not ask for it."""

    source: Source
    running: Source
    structure: Structure
    recipe: Recipe
    linears: tuple[PlannedLinear, ...]
    tables: tuple[PlannedTable, ...]
    tensors: dict[str, TensorShape]
    kept: tuple[str, ...]
    kept_modules: tuple[tuple[str, str], ...]
    peak_memory_bytes: int
    bit_plan: BitPlan | None = None
    not_written: str | None = None

    @property
    def calibrated(self) -> bool:
        return self.recipe.calibration != NO_CALIBRATION

    @property
    def window_start(self) -> str | None:
        """The special tokens at the start of every calibration window; "" for none, None for a run without text."""
        if not self.calibrated or self.source.reads_images:
            return None
        tokenizer = self.source.load_tokenizer()
        return tokens_as_text(tokenizer, leading_tokens(tokenizer))

    def at(self, bits: Mapping[str, Choice]) -> Plan:
        """The same run with these bits, see `make_plan`."""
        # The recipe already names the replacement text, so the new plan cannot know the reason.
        return replace(make_plan(self.source, self.recipe, bits), not_written=self.not_written)

    @property
    def parameters(self) -> int:
        """Number of parameters of the original model; tied ones count once."""
        return sum(parameter.numel() for parameter in self.source.skeleton().parameters())

    @property
    def quantized_weights(self) -> int:
        return sum(linear.spec.out_features * linear.spec.in_features for linear in self.linears)

    @property
    def quantized_bytes(self) -> int:
        return sum(linear.layout.nbytes for linear in self.linears)

    @property
    def table_bytes(self) -> int:
        return sum(table.nbytes for table in self.tables)

    @property
    def kept_bytes(self) -> int:
        return sum(nbytes(self.tensors[name]) for name in self.kept)

    @property
    def file_bytes(self) -> int:
        """Size of the weight files at the bits of `linears`, headers included."""
        return sum(shard.nbytes for shard in plan_shards(self.tensors, self.recipe.shard_bytes))

    @property
    def open_bits(self) -> bool:
        """Whether the bits of the layers have yet to be chosen; those of `linears` are then placeholders."""
        return self.recipe.allocates and self.bit_plan is None

    @property
    def open_tables(self) -> bool:
        """Whether the forms of embeddings and heads have yet to be chosen."""
        return self.open_bits and self.recipe.open_tables

    @property
    def budget(self) -> Budget:
        """The budget within which bits are chosen."""
        return budget_of(self.recipe)

    @property
    def most_bytes(self) -> int:
        """`file_bytes`; if the bits have yet to be chosen, the size that their budget allows, up to the few bytes by
        which a choice changes the headers."""
        if not self.open_bits:
            return self.file_bytes
        if (limit := self.budget.file_limit(self.parameters)) is not None:
            return limit
        allowed = self.budget.layer_bytes(self.quantized_weights, 0, self.parameters)
        largest = sum(table.most_bytes for table in self.tables) if self.open_tables else self.table_bytes
        return self.file_bytes + max(0, allowed - self.quantized_bytes) + largest - self.table_bytes

    @property
    def state_bytes(self) -> int:
        """Bytes that a run stores in addition to the artifact until it ends: hidden states at two depths, in one or two
        versions; token weights; the outputs of the linears of one block; and, for asymmetric calibration, their inputs
        in the original."""
        if not self.calibrated:
            return 0
        recipe = self.recipe
        depths = 2 * self._hidden_bytes(recipe.samples)
        weights = token_weight_bytes(recipe, self.flow, self.structure.linears) if recipe.loss_aware else 0
        return depths + weights + self._waiting_bytes()

    def held_bytes(self, team: Team) -> int:
        """Bytes of hidden states that this process of a team has in memory. The first process has them on disk, the
        others have those of their samples in memory."""
        if team.first or not self.calibrated:
            return 0
        shards = team.shards(-(-self.recipe.samples // self.recipe.batch_size))
        return self._hidden_bytes(len(list(shards.own())) * self.recipe.batch_size)

    @cached_property
    def flow(self) -> Flow:
        """The flow of a calibration sample through the blocks."""
        return measure_flow(self.source, self.structure.blocks, self.recipe.seq_len)

    def _hidden_bytes(self, samples: int) -> int:
        return versions_kept(self.recipe) * samples * self.flow.values * self.running.dtype.itemsize

    @property
    def tokens_read(self) -> dict[str, float]:
        """Tokens of a sample that each linear reads, by name: on average, for experts."""
        shares, blocks = routed_shares(self.source.skeleton()), self.structure.blocks
        return {
            spec.name: self.flow.tokens[spec.block]
            * (1.0 if spec.experts is None else shares[f"{blocks[spec.block]}.{spec.experts}"])
            for spec in self.structure.linears
        }

    def _waiting_bytes(self) -> int:
        """Bytes that `InputCache` and `OutputCache` store for the largest block, if no two linears share an input."""
        recipe, read = self.recipe, self.tokens_read
        values = dict.fromkeys(range(len(self.structure.blocks)), 0.0)
        for spec in self.structure.linears:
            recalled = spec.in_features if recipe.compares_inputs else 0
            played = spec.out_features if recipe.true_sequential else 0
            values[spec.block] += read[spec.name] * (recalled + played)
        return int(max(values.values())) * recipe.samples * self.running.dtype.itemsize

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the quantized layers, scales and offsets included."""
        return 8 * self.quantized_bytes / self.quantized_weights

    @property
    def planes_per_weight(self) -> float:
        """Bits of the quantized layers, averaged over their weights."""
        planes = sum(linear.layout.bits * linear.spec.out_features * linear.spec.in_features for linear in self.linears)
        return planes / self.quantized_weights

    @property
    def whole_bits_per_weight(self) -> float:
        """Upper limit on the stored bits per parameter of the whole model."""
        return 8 * self.most_bytes / self.parameters

    def artifact_format(self) -> ArtifactFormat:
        """The quantization_config of the artifact."""
        # With the most common choice as the default, most layers need no entry.
        common = Counter(linear.layout.format.choice for linear in self.linears).most_common(1)[0][0]
        modules = {linear.spec.name: linear.layout for linear in self.linears}
        tables = {table.name: table.layout for table in self.tables}
        return ArtifactFormat(
            self.recipe.at(common), modules, tables, split_experts=has_split_experts(self.source.skeleton())
        )


def budget_of(recipe: Recipe) -> Budget:
    """The budget within which a recipe has bits chosen, see `Recipe.allocates`."""
    return Budget.parse(recipe.avg_bits, recipe.target_size, average_file_bits=recipe.avg_file_bits)


def make_plan(
    source: Source, recipe: Recipe, bits: Mapping[str, Choice] | None = None, *, memory: int | None = None
) -> Plan:
    """Plan a run from headers alone.

    bits: bits (or the word of a shift primitive) of every linear that the recipe does not skip, by full name, and forms
        of tables; by default those of the recipe's bit plan, or its primitive and bits for all.
    memory: upper limit on the memory of the run in bytes, by default that of the machine.

    Raises SourceError if there is nothing to quantize, see `find_structure`; AllocationError if the bit plan is
    unreadable, or is for another model or storage format; RecipeError for windows longer than the model's positions.
    """
    recipe = _within_positions(source, recipe)
    # Without data, the model only runs on the sample of the final check.
    running = source if recipe.calibration == NO_CALIBRATION else source.computed_on(choose_device(recipe.device))
    limit = machine_memory() if memory is None else min(memory, machine_memory())
    recipe, not_written = _with_writable_text(running, recipe, limit)
    model = source.skeleton()
    structure = find_structure(model, recipe.skip, allow_partial=recipe.allow_partial)
    if recipe.distill_epochs and any(structure.shared_in(depth) for depth in range(len(structure.blocks))):
        raise SourceError(
            f"{type(model).__name__} has blocks that share weights, which distillation cannot tune; give "
            "`distill_epochs=0`."
        )
    bit_plan = None
    if bits is None and recipe.bit_plan is not None:
        bit_plan = load_plan(Path(recipe.bit_plan))
        tables, _ = plan_tables(model, structure, recipe)
        shapes = {table.name: (table.layout.rows, table.layout.columns) for table in tables if recipe.open_tables}
        bit_plan.check(recipe.bit_plan, source.fingerprint, recipe.part(MatrixStorage), structure.linears, shapes)
        bits = bit_plan.choices
    linears = tuple(
        PlannedLinear(
            spec,
            PackedLayout(
                recipe.at(recipe.choice if bits is None else bits[spec.name]), spec.out_features, spec.in_features
            ),
        )
        for spec in structure.linears
    )
    tables, kept_modules = plan_tables(model, structure, recipe, bits)
    tensors, kept = _tensors(model, structure, linears, tables)
    plan = Plan(
        source, running, structure, recipe, linears, tables, tensors, kept, kept_modules, 0, bit_plan, not_written
    )
    return replace(plan, peak_memory_bytes=peak_memory(running, structure, tables, recipe, plan.most_bytes))


def _within_positions(source: Source, recipe: Recipe) -> Recipe:
    """The recipe with windows that fit the model's positions. A default length is shortened if necessary.

    Raises RecipeError for a length given by the user that does not fit.
    """
    if source.reads_images or recipe.calibration == NO_CALIBRATION:
        return recipe
    requested = recipe.seq_len if "seq_len" in recipe.model_fields_set else None
    length = window_length(requested, recipe.seq_len, {source.spec: position_limit(source.config)}, "`seq_len`")
    return recipe if length == recipe.seq_len else recipe.model_copy(update={"seq_len": length})


def _with_writable_text(running: Source, recipe: Recipe, memory: int) -> tuple[Recipe, str | None]:
    """The recipe, with the builtin text in place of text that the model cannot write, and the reason, if any."""
    requests = [] if running.reads_images else written_by_model(recipe)
    reasons = (why_not(running, request, memory) for request in requests)
    reason = next(filter(None, reasons), None)
    if reason is None:
        return recipe, None
    return recipe.model_copy(update={"calibration": without_self(recipe.calibration)}), reason


def least_memory(plan: Plan, limit: int) -> tuple[int, int]:
    """The largest batch size, by halving the recipe's own, with which a run is expected to need at most `limit` bytes,
    or 1; and the bytes that the run then is expected to need."""
    batch_size, expected = plan.recipe.batch_size, plan.peak_memory_bytes
    while expected > limit and batch_size > 1:
        batch_size //= 2
        recipe = plan.recipe.model_copy(update={"batch_size": batch_size})
        expected = peak_memory(plan.running, plan.structure, plan.tables, recipe, plan.most_bytes)
    return batch_size, expected


def _tensors(
    model: nn.Module,
    structure: Structure,
    linears: tuple[PlannedLinear, ...],
    tables: tuple[PlannedTable, ...],
) -> tuple[dict[str, TensorShape], tuple[str, ...]]:
    """All tensors to write, in the order of the model's state, and the names of those that stay unquantized."""
    packed = {f"{linear.spec.name}.weight": linear for linear in linears}
    rows = {f"{table.name}.weight": table for table in tables}
    duplicates = {name for group in structure.tied for name in group[1:]}
    tensors: dict[str, TensorShape] = {}
    kept: list[str] = []
    for name, tensor in model.state_dict().items():
        if name in packed:
            linear = packed[name]
            tensors |= {f"{linear.spec.name}.{suffix}": shape for suffix, shape in linear.layout.tensors().items()}
        elif name in rows:
            tensors |= rows[name].tensors()
        elif name not in duplicates:
            tensors[name] = (tuple(tensor.shape), tensor.dtype)
            kept.append(name)
    return tensors, tuple(kept)
