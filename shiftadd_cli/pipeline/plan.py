"""What a run will do, known before any weight is read: layers, and what is stored of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from shiftadd_cli.allocation.plan_file import BitPlan, load_plan
from shiftadd_cli.artifact.format import ArtifactFormat
from shiftadd_cli.artifact.shards import TensorShape
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
    """One linear and the form it will be stored in."""

    spec: LinearSpec
    layout: PackedLayout


@dataclass(frozen=True)
class Plan:
    """A run, fixed: `source` is the model as it will be stored, `running` the same at the dtype that is computed in;
    `tensors` are all tensors of the artifact in file order; `kept` those stored as they are, and `kept_modules` the
    modules with such, each with the reason; `tables` is what is stored as 8-bit rows; `bit_plan` the file that bits
    come from, if any. `not_written` says why the model does not write the calibration text that it was asked for, so
    that the recipe has the builtin one in its place; None where it does or was not asked."""

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
        """The special tokens that every calibration window begins with; "" for none, None for a run without text."""
        if not self.calibrated or self.source.reads_images:
            return None
        tokenizer = self.source.load_tokenizer()
        return tokens_as_text(tokenizer, leading_tokens(tokenizer))

    def at(self, bits: Mapping[str, Choice]) -> Plan:
        """The same run with these bits, see `make_plan`."""
        # Its recipe names the text that took the place of the model's own, and the reason is known here alone.
        return replace(make_plan(self.source, self.recipe, bits), not_written=self.not_written)

    @property
    def parameters(self) -> int:
        """Parameters of the original model, tied ones once."""
        return sum(parameter.numel() for parameter in self.source.skeleton().parameters())

    @property
    def quantized_weights(self) -> int:
        return sum(each.spec.out_features * each.spec.in_features for each in self.linears)

    @property
    def quantized_bytes(self) -> int:
        return sum(each.layout.nbytes for each in self.linears)

    @property
    def table_bytes(self) -> int:
        return sum(each.nbytes for each in self.tables)

    @property
    def kept_bytes(self) -> int:
        return sum(_nbytes(self.tensors[name]) for name in self.kept)

    @property
    def after_bytes(self) -> int:
        """Bytes of all tensors written; the files add their headers."""
        return self.quantized_bytes + self.table_bytes + self.kept_bytes

    @property
    def open_bits(self) -> bool:
        """Whether the bits of the layers are still to be chosen; those of `linears` then stand for them."""
        return self.recipe.avg_bits is not None and self.bit_plan is None

    @property
    def most_bytes(self) -> int:
        """`after_bytes`, and where bits are still to be chosen what their average allows."""
        allowed = int((self.recipe.avg_bits or 0) * self.quantized_weights / 8) if self.open_bits else 0
        return self.after_bytes + max(0, allowed - self.quantized_bytes)

    @property
    def state_bytes(self) -> int:
        """What a run keeps beside the artifact until it ends: hidden states at two depths, in so many versions, token
        weights, and of a block what its linears give out, and for asymmetric calibration what they read in the
        original."""
        if not self.calibrated:
            return 0
        recipe = self.recipe
        flow = measure_flow(self.source, self.structure.blocks, recipe.seq_len)
        depths = 2 * self._hidden_bytes(flow, recipe.samples)
        weights = token_weight_bytes(recipe, flow, self.structure.linears) if recipe.loss_aware else 0
        return depths + weights + self._waiting_bytes(flow)

    def held_bytes(self, team: Team) -> int:
        """Hidden states that this process of a team has in memory: the first has them on disk, the others those of
        their samples in memory."""
        if team.first or not self.calibrated:
            return 0
        shards = team.shards(-(-self.recipe.samples // self.recipe.batch_size))
        flow = measure_flow(self.source, self.structure.blocks, self.recipe.seq_len)
        return self._hidden_bytes(flow, len(list(shards.own())) * self.recipe.batch_size)

    def _hidden_bytes(self, flow: Flow, samples: int) -> int:
        return versions_kept(self.recipe) * samples * flow.values * self.running.dtype.itemsize

    def _waiting_bytes(self, flow: Flow) -> int:
        """Bytes that `InputCache` and `OutputCache` keep of the largest block, as if no two linears read the same."""
        recipe = self.recipe
        values = dict.fromkeys(range(len(self.structure.blocks)), 0.0)
        shares = routed_shares(self.source.skeleton())
        for each in self.linears:
            spec = each.spec
            place = f"{self.structure.blocks[spec.block]}.{spec.experts}"
            read = flow.tokens[spec.block] * (1.0 if spec.experts is None else shares[place])
            recalled = spec.in_features if recipe.asymmetric else 0
            played = spec.out_features if recipe.true_sequential else 0
            values[spec.block] += read * (recalled + played)
        return int(max(values.values())) * recipe.samples * self.running.dtype.itemsize

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the quantized layers, scales and offsets included."""
        return 8 * self.quantized_bytes / self.quantized_weights

    @property
    def planes_per_weight(self) -> float:
        """Bits of the quantized layers, averaged over their weights."""
        planes = sum(each.layout.bits * each.spec.out_features * each.spec.in_features for each in self.linears)
        return planes / self.quantized_weights

    @property
    def whole_bits_per_weight(self) -> float:
        """Stored bits per parameter of the whole model, at most."""
        return 8 * self.most_bytes / self.parameters

    def artifact_format(self) -> ArtifactFormat:
        """The quantization_config of the artifact."""
        # Most layers then need no entry of their own.
        common = Counter(linear.layout.format.choice for linear in self.linears).most_common(1)[0][0]
        modules = {linear.spec.name: linear.layout for linear in self.linears}
        tables = {each.name: each.shape for each in self.tables}
        return ArtifactFormat(
            self.recipe.at(common), modules, tables, split_experts=has_split_experts(self.source.skeleton())
        )


def make_plan(
    source: Source, recipe: Recipe, bits: Mapping[str, Choice] | None = None, *, memory: int | None = None
) -> Plan:
    """Plan a run from headers alone.

    bits: of every linear that the recipe does not skip (or the word of a shift primitive), by full name; by default
        those of the recipe's bit plan, or its primitive and bits for all.
    memory: bytes that the run may take, by default those of the machine.

    Raises SourceError when there is nothing to quantize, see `find_structure`; AllocationError when the bit plan cannot
    be read, or is of another model or another way to store it; RecipeError for windows longer than the model's
    positions.
    """
    recipe = _within_positions(source, recipe)
    # Without data nothing is run but the sample that the result is checked on.
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
        bit_plan.check(recipe.bit_plan, source.fingerprint, recipe.part(MatrixStorage), structure.linears)
        bits = bit_plan.bits
    linears = tuple(
        PlannedLinear(
            spec,
            PackedLayout(
                recipe.at(recipe.choice if bits is None else bits[spec.name]), spec.out_features, spec.in_features
            ),
        )
        for spec in structure.linears
    )
    tables, kept_modules = plan_tables(model, structure, recipe)
    tensors, kept = _tensors(model, structure, linears, tables)
    plan = Plan(
        source, running, structure, recipe, linears, tables, tensors, kept, kept_modules, 0, bit_plan, not_written
    )
    return replace(plan, peak_memory_bytes=peak_memory(running, structure, tables, recipe, plan.most_bytes))


def _within_positions(source: Source, recipe: Recipe) -> Recipe:
    """The recipe with windows that the model can read: a length that the user did not give is shortened.

    Raises RecipeError for a length that the user gave and the model cannot read.
    """
    if source.reads_images or recipe.calibration == NO_CALIBRATION:
        return recipe
    asked = recipe.seq_len if "seq_len" in recipe.model_fields_set else None
    length = window_length(asked, recipe.seq_len, {source.spec: position_limit(source.config)}, "`seq_len`")
    return recipe if length == recipe.seq_len else recipe.model_copy(update={"seq_len": length})


def _with_writable_text(running: Source, recipe: Recipe, memory: int) -> tuple[Recipe, str | None]:
    """The recipe with the builtin text in place of one that this model cannot write, and the reason if there is one."""
    requests = [] if running.reads_images else written_by_model(recipe)
    reasons = (why_not(running, request, memory) for request in requests)
    reason = next(filter(None, reasons), None)
    if reason is None:
        return recipe, None
    return recipe.model_copy(update={"calibration": without_self(recipe.calibration)}), reason


def least_memory(plan: Plan, limit: int) -> tuple[int, int]:
    """The largest batch size, of the recipe's own and its halves, with which a run is expected to take at most `limit`
    bytes, or 1; and the bytes that it then is expected to take."""
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
    """All tensors to write, in the order of the model's state, and the names of those that stay as they are."""
    packed = {f"{each.spec.name}.weight": each for each in linears}
    rows = {f"{each.name}.weight": each for each in tables}
    duplicates = {name for group in structure.tied for name in group[1:]}
    tensors: dict[str, TensorShape] = {}
    kept: list[str] = []
    for name, tensor in model.state_dict().items():
        if name in packed:
            each = packed[name]
            tensors |= {f"{each.spec.name}.{suffix}": shape for suffix, shape in each.layout.tensors().items()}
        elif name in rows:
            tensors |= rows[name].tensors()
        elif name not in duplicates:
            tensors[name] = (tuple(tensor.shape), tensor.dtype)
            kept.append(name)
    return tensors, tuple(kept)


def _nbytes(shape: TensorShape) -> int:
    return torch.Size(shape[0]).numel() * shape[1].itemsize
