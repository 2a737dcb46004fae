"""What a run will do, known before any weight is read: layers, stored sizes, expected memory."""

from __future__ import annotations

import re
import resource
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from shiftadd_cli.allocation.plan_file import BitPlan, load_plan
from shiftadd_cli.artifact.format import ArtifactFormat, MatrixFormat
from shiftadd_cli.artifact.shards import TensorShape
from shiftadd_cli.bcq.choices import Choice, parts_of_choice
from shiftadd_cli.bcq.solver import SolverOptions
from shiftadd_cli.bcq.weight import PackedLayout
from shiftadd_cli.calibration.flow import Flow, measure_flow
from shiftadd_cli.calibration.gradients import MEMORY_BYTES as GRADIENT_BYTES
from shiftadd_cli.calibration.mixtures import COPIES, ROOM_BYTES, expert_bytes
from shiftadd_cli.device import choose_device
from shiftadd_cli.distillation.end import SLICE_BYTES as DISTILLED_SLICE_BYTES
from shiftadd_cli.distillation.stack import MEMORY_BYTES as DECODED_BYTES
from shiftadd_cli.distributed.team import Team
from shiftadd_cli.pipeline.tables import PlannedTable, plan_tables
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.source import LinearSpec, Source, Structure, find_structure
from shiftadd_cli.source.experts import has_split_experts, routed_shares

NO_CALIBRATION = "none"

# Working copies, in float32, of the matrix being solved and of its Hessian; measured on the solver's default path.
_MATRIX_COPIES = 14
_HESSIAN_COPIES = 6
# Tensors of a batch that live at once inside a block, in units of its widest activation.
_ACTIVATION_COPIES = 8
# Bytes per weight of a block while it is tuned: latent weights, their gradients and running means, decoded values and
# codes; and activations kept for the way back, in units of `_ACTIVATION_COPIES`.
_TUNING_BYTES = 32
_TUNING_ACTIVATIONS = 3
# What a run still loads after planning: libraries and allocator slack, and a tokenizer, by entry of its vocabulary.
_LATER_BYTES = 120_000_000
_VOCABULARY_ENTRY_BYTES = 3000
# What the allocator keeps of what was freed, over all: SmolLM2 took from 0.98 to 1.12 times the sum of its parts.
_SLACK = 1.15


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
    come from, if any."""

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

    @property
    def calibrated(self) -> bool:
        return self.recipe.calibration != NO_CALIBRATION

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
    def state_bytes(self) -> int:
        """What a run keeps beside the artifact until it ends: hidden states at two depths, in so many versions, token
        weights, and of a block what its linears give out, and for asymmetric calibration what they read in the
        original."""
        if not self.calibrated:
            return 0
        recipe = self.recipe
        flow = measure_flow(self.source, self.structure.blocks, recipe.seq_len)
        depths = 2 * self._hidden_bytes(flow, recipe.samples)
        weights = _token_weight_bytes(recipe, flow, self.linears) if recipe.loss_aware else 0
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
        return _versions(self.recipe) * samples * flow.values * self.running.dtype.itemsize

    def _waiting_bytes(self, flow: Flow) -> int:
        """Of what `Recall` and `Playback` keep of a block, as if no two linears read the same; of the block where that
        is most."""
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
        """Stored bits per parameter of the whole model."""
        return 8 * self.after_bytes / self.parameters

    def artifact_format(self) -> ArtifactFormat:
        """The quantization_config of the artifact."""
        fields = {name: getattr(self.recipe, name) for name in MatrixFormat.__dataclass_fields__}
        # Most layers then need no word of their own.
        usual = Counter(each.layout.choice for each in self.linears).most_common(1)[0][0]
        fields["primitive"], fields["bits"] = parts_of_choice(usual)
        common = MatrixFormat(**fields)
        modules = {}
        for each in self.linears:
            own = replace(common, primitive=each.layout.primitive, bits=each.layout.bits)
            modules[each.spec.name] = (own, each.spec.out_features, each.spec.in_features)
        tables = {each.name: each.shape for each in self.tables}
        return ArtifactFormat(common, modules, tables, split_experts=has_split_experts(self.source.skeleton()))


def make_plan(source: Source, recipe: Recipe, bits: Mapping[str, Choice] | None = None) -> Plan:
    """Plan a run from headers alone.

    bits: of every linear that the recipe does not skip (or the word of a shift primitive), by full name; by default
        those of the recipe's bit plan, or its primitive and bits for all.

    Raises SourceError when there is nothing to quantize, see `find_structure`; AllocationError when the bit plan cannot
    be read, or is of another model or another way to store it.
    """
    model = source.skeleton()
    structure = find_structure(model, recipe.skip)
    options = SolverOptions.from_recipe(recipe)
    bit_plan = None
    if bits is None and recipe.bit_plan is not None:
        bit_plan = load_plan(Path(recipe.bit_plan))
        bit_plan.check(recipe.bit_plan, source.fingerprint, options, structure.linears)
        bits = bit_plan.bits
    linears = tuple(
        PlannedLinear(
            spec,
            (options if bits is None else options.at(bits[spec.name])).layout(spec.out_features, spec.in_features),
        )
        for spec in structure.linears
    )
    tables, kept_modules = plan_tables(model, structure, recipe)
    tensors, kept = _tensors(model, structure, linears, tables)
    # Without data nothing is run.
    running = source if recipe.calibration == NO_CALIBRATION else source.computed_on(choose_device(recipe.device))
    peak = _peak_memory(running, structure, linears, tables, recipe)
    return Plan(source, running, structure, recipe, linears, tables, tensors, kept, kept_modules, peak, bit_plan)


def least_memory(plan: Plan, limit: int) -> tuple[int, int]:
    """The largest batch size, of the recipe's own and its halves, with which a run is expected to take at most `limit`
    bytes, or 1; and the bytes that it then is expected to take."""
    batch_size, expected = plan.recipe.batch_size, plan.peak_memory_bytes
    while expected > limit and batch_size > 1:
        batch_size //= 2
        recipe = plan.recipe.model_copy(update={"batch_size": batch_size})
        expected = _peak_memory(plan.running, plan.structure, plan.linears, plan.tables, recipe)
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
    duplicates = {name for group in structure.tied for name in sorted(group, key=list(model.state_dict()).index)[1:]}
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


def _versions(recipe: Recipe) -> int:
    """Models that hidden states are kept of: the one being quantized, and the original where it is aimed at."""
    return 2 if recipe.follows_original else 1


def _token_weight_bytes(recipe: Recipe, flow: Flow, linears: tuple[PlannedLinear, ...]) -> int:
    return 4 * recipe.samples * sum(flow.tokens[each.spec.block] for each in linears if each.spec.experts is None)


def _nbytes(shape: TensorShape) -> int:
    return torch.Size(shape[0]).numel() * shape[1].itemsize


def _module_bytes(module: nn.Module) -> int:
    return sum(each.numel() * each.element_size() for each in module.parameters())


def _peak_memory(
    source: Source,
    structure: Structure,
    linears: tuple[PlannedLinear, ...],
    tables: tuple[PlannedTable, ...],
    recipe: Recipe,
) -> int:
    """Expected peak resident memory of the process that runs `source`, in bytes.

    What is resident now and will be loaded for any model, and the larger of two moments, with some slack: embeddings
    and one block while the first inputs are made; one block with its moments, and a batch or the solver's copies.
    Hidden states are on disk, but while gradients, or what bits matter to each layer, are measured. Asymmetric
    calibration and block reconstruction keep the block again as it is in the original. Distillation keeps decoded
    blocks, and the inputs of all blocks for a batch.
    """
    model = source.skeleton()
    blocks = {name: model.get_submodule(name) for name in structure.blocks}
    block = max(_module_bytes(module) for module in blocks.values())
    # Stacks of experts are put together from what is stored, and cut up: 1.6 to 2.0 times the block, as measured.
    reading = 2 * block if has_split_experts(model) else block
    outside = source.model_bytes - sum(_module_bytes(module) for module in blocks.values())
    # Codes are made beside the matrix they stand for, before any block is loaded.
    codes = max((each.nbytes for each in tables), default=0)
    tall: dict[tuple[int, str, int], int] = {}
    for each in linears:
        spec = each.spec
        siblings = (spec.block, spec.kind.rpartition(".")[0], spec.in_features)
        tall[siblings] = tall.get(siblings, 0) + spec.out_features
    solver = 4 * max(_MATRIX_COPIES * rows * key[2] + _HESSIAN_COPIES * key[2] ** 2 for key, rows in tall.items())
    vocabulary = 0 if source.reads_images else source.config.get_text_config().vocab_size
    resident = resident_bytes() + _LATER_BYTES + _VOCABULARY_ENTRY_BYTES * vocabulary
    if recipe.calibration == NO_CALIBRATION:
        return int(_SLACK * (resident + max(outside + codes, reading, block + solver)))
    versions = _versions(recipe)
    flow = measure_flow(source, structure.blocks, recipe.seq_len)
    itemsize = source.dtype.itemsize
    # By block, since the widest linears of a model in stages are where tokens are fewest.
    wide = max(flow.tokens[each.spec.block] * max(each.spec.in_features, each.spec.out_features) for each in linears)
    read = max(flow.tokens[each.spec.block] * each.spec.in_features for each in linears)
    activations = recipe.batch_size * (_ACTIVATION_COPIES * wide * itemsize + 4 * read)
    hidden = recipe.samples * flow.values * itemsize
    pixels = recipe.samples * flow.sample_bytes
    # Width and rows of the linears that read one input, by block; a block may have none left.
    inputs = [[(key[2], rows) for key, rows in tall.items() if key[0] == index] for index in range(len(blocks))]
    squares = [[width**2 for width, _ in each] for each in inputs]
    gathered = max(max(each, default=0) if recipe.true_sequential else sum(each) for each in squares)
    moments = 4 * (2 if recipe.asymmetric else 1) * gathered
    if recipe.true_sequential:
        # Those of experts side by side.
        moments = max(moments, min(_expert_bytes(linears, cross=bool(recipe.asymmetric)), ROOM_BYTES) // COPIES)
    # A batch's inputs in the original, as they are read and in float32.
    recalled = recipe.batch_size * (itemsize + 4) * read if recipe.asymmetric else 0
    # Sums of a shard, of all shards, and in the end the moments themselves.
    gathering = max(2 * moments + activations + recalled, 3 * moments)
    solving = moments + solver
    tuning = 0
    if recipe.reconstruct_epochs:
        weights = max(sum(width * rows for width, rows in each) for each in inputs)
        tuning = _TUNING_BYTES * weights + _TUNING_ACTIVATIONS * activations
    distilling = 0
    if recipe.distill_epochs:
        decoded = min(DECODED_BYTES, sum(_module_bytes(module) for module in blocks.values())) + block
        inputs_of_blocks = recipe.batch_size * len(blocks) * flow.values * itemsize
        through = _TUNING_ACTIVATIONS * activations
        logits = DISTILLED_SLICE_BYTES if vocabulary else 0
        distilling = outside + decoded + inputs_of_blocks + max(through, logits)
    starting = outside + max(codes, reading, block + activations)
    running = max(reading, versions * block + max(gathering, solving, tuning))
    token_weights = 0
    if recipe.loss_aware:
        token_weights = _token_weight_bytes(recipe, flow, linears)
        # Squared gradients, and their powers, beside the inputs of the blocks.
        starting += 2 * token_weights + min(GRADIENT_BYTES, len(blocks) * hidden)
    if recipe.avg_bits is not None:
        measuring = outside + running + hidden + min(GRADIENT_BYTES, len(blocks) * hidden)
        return int(_SLACK * (resident + pixels + max(starting, running + token_weights, distilling, measuring)))
    return int(_SLACK * (resident + pixels + max(starting, running + token_weights, distilling)))


def _expert_bytes(linears: tuple[PlannedLinear, ...], *, cross: bool) -> int:
    """What gathering the moments of alike inputs of all experts of a mixture takes, where that is most."""
    found: Counter[tuple[int, str | None, str]] = Counter()
    for each in linears:
        if each.spec.experts is not None:
            alike = (each.spec.block, each.spec.experts, each.spec.kind.rpartition(".")[2])
            found[alike] += expert_bytes(each.spec.in_features, cross=cross)
    return max(found.values(), default=0)


def resident_bytes() -> int:
    """Peak resident memory of this process so far, in bytes."""
    # Not ru_maxrss where this is known: Linux hands a process the peak of the one that started it, at exec.
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), flags=re.MULTILINE)):
        return 1024 * int(found[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
