"""Memory of a run: the expected peak of every stage, and the measured one of a process."""

from __future__ import annotations

import os
import re
import resource
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import nn

from shiftadd_cli.allocation.sensitivity import gradient_stride
from shiftadd_cli.bcq.table_layout import TableLayout
from shiftadd_cli.blockwise.flow import Flow, measure_flow
from shiftadd_cli.blockwise.passage import BYTES_PER_LOGIT, LOGIT_BYTES
from shiftadd_cli.calibration.gradients import MEMORY_BYTES as GRADIENT_BYTES
from shiftadd_cli.calibration.mixtures import COPIES, ROOM_BYTES, expert_bytes
from shiftadd_cli.distillation.end import SLICE_BYTES as DISTILLED_SLICE_BYTES
from shiftadd_cli.distillation.stack import MEMORY_BYTES as DECODED_BYTES
from shiftadd_cli.pipeline.tables import TILE_WEIGHTS, PlannedTable
from shiftadd_cli.recipe import NO_CALIBRATION, Recipe
from shiftadd_cli.self_text.write import writing_bytes, written_by_model
from shiftadd_cli.source import LinearSpec, Source, Structure
from shiftadd_cli.source.experts import has_split_experts

# Float32 working copies of the matrix being solved and of its Hessian, measured on the solver's default path.
_MATRIX_COPIES = 14
_HESSIAN_COPIES = 6
# Tensors of a batch that live at once inside a block, in units of its widest activation.
_ACTIVATION_COPIES = 8
# Bytes per weight of a block while it is tuned: latent weights, their gradients and running means, decoded values and
# codes; and activations kept for the backward pass, in units of `_ACTIVATION_COPIES`.
_TUNING_BYTES = 32
_TUNING_ACTIVATIONS = 3
# A run still loads libraries after planning. A tokenizer takes memory by entry of its vocabulary while it is read, most
# of which it frees again.
_LATER_BYTES = 120_000_000
_VOCABULARY_ENTRY_BYTES = 3000
# The allocator keeps some freed memory: SmolLM2 took from 0.98 to 1.12 times the sum of its parts.
_SLACK = 1.15
# Files in which Linux gives the memory limit of a container, by version of its control groups.
_CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def machine_memory() -> int:
    """Bytes of memory that all processes here may take: those of the machine, or fewer in a container with a limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _CONTAINER_LIMITS:
        # Without a limit the file says "max", or a number beyond any machine.
        if path.is_file() and (text := path.read_text().strip()).isdecimal():
            total = min(total, int(text))
    return total


def versions_kept(recipe: Recipe) -> int:
    """Number of models whose hidden states are kept: the quantized one, and the original where the run follows it."""
    return 2 if recipe.follows_original else 1


def token_weight_bytes(recipe: Recipe, flow: Flow, linears: Sequence[LinearSpec]) -> int:
    """Bytes of one float32 weight per token and linear."""
    return 4 * recipe.samples * sum(flow.tokens[spec.block] for spec in linears if spec.experts is None)


@dataclass(frozen=True)
class RunSizes:
    """Bytes of the parts of a run that its stages have in memory together, known from headers alone.

    Attributes:
        source: the model, at the dtype that is computed in.
        tables: embeddings and heads to be compressed.
        loaded: bytes of the result, which is loaded at the end.
    """

    source: Source
    structure: Structure
    tables: Sequence[PlannedTable]
    recipe: Recipe
    loaded: int

    @cached_property
    def blocks(self) -> list[int]:
        """Parameters of every block."""
        model = self.source.skeleton()
        return [_module_bytes(model.get_submodule(name)) for name in self.structure.blocks]

    @property
    def block(self) -> int:
        """The largest block."""
        return max(self.blocks)

    @property
    def reading(self) -> int:
        """A block while it is read. Stacked experts are assembled and cut up: 1.6 to 2.0 blocks, as measured."""
        return 2 * self.block if has_split_experts(self.source.skeleton()) else self.block

    @property
    def outside(self) -> int:
        """Everything outside the blocks: embeddings, norms, head."""
        return self.source.model_bytes - sum(self.blocks)

    @property
    def outside_in_float32(self) -> int:
        """The same in the float32 model that divergences are measured with."""
        return self.outside * 4 // self.source.dtype.itemsize

    @property
    def codes(self) -> int:
        """Codes of a table, made next to the matrix that they replace, before any block is loaded, and the working
        copies of a tile where they are solved for."""
        return max((table.nbytes + self._tile(table.layout) for table in self.tables), default=0)

    @property
    def heads(self) -> int:
        """Compressed heads, in the original."""
        model = self.source.skeleton()
        readers = (table.reader for table in self.tables if table.reader is not None)
        return sum(_module_bytes(model.get_submodule(reader)) for reader in readers)

    @property
    def walked(self) -> int:
        """Hidden states of the walk that ends with the inputs of a head."""
        walks = any(table.reader is not None and self.solved(table.layout) for table in self.tables)
        return self.hidden if walks else 0

    @property
    def trial(self) -> int:
        """A table with other values, and those, in float32, and a tile that is solved for, where forms are compared."""
        if not self.forms_are_chosen:
            return 0
        layouts = (table.layout for table in self.tables)
        return max((8 * layout.rows * layout.columns + self._tile(layout) for layout in layouts), default=0)

    def solved(self, layout: TableLayout) -> bool:
        """Whether a table may become a compressed matrix."""
        return layout.packed is not None or self.forms_are_chosen

    @property
    def forms_are_chosen(self) -> bool:
        """Whether the run chooses the forms of its tables."""
        return self.recipe.allocates and self.recipe.open_tables

    def _tile(self, layout: TableLayout) -> int:
        if not self.solved(layout):
            return 0
        weights = min(layout.rows * layout.columns, TILE_WEIGHTS)
        return 4 * (_MATRIX_COPIES * weights + _HESSIAN_COPIES * layout.columns**2)

    @cached_property
    def tall(self) -> dict[tuple[int, str, int], int]:
        """Rows of the linears that read one input, by block, module and width."""
        rows: Counter[tuple[int, str, int]] = Counter()
        for spec in self.structure.linears:
            rows[spec.block, spec.kind.rpartition(".")[0], spec.in_features] += spec.out_features
        return rows

    @property
    def solver(self) -> int:
        """Working copies of the largest matrix and its Hessian."""
        sizes = (_MATRIX_COPIES * rows * key[2] + _HESSIAN_COPIES * key[2] ** 2 for key, rows in self.tall.items())
        return 4 * max(sizes)

    @property
    def vocabulary(self) -> int:
        """Entries of a language model's vocabulary; 0 for a vision model."""
        size: int = 0 if self.source.reads_images else self.source.config.get_text_config().vocab_size
        return size

    @property
    def logits(self) -> int:
        """Predictions of one sample."""
        return min(LOGIT_BYTES, self.recipe.seq_len * self.vocabulary * BYTES_PER_LOGIT)

    @cached_property
    def flow(self) -> Flow:
        return measure_flow(self.source, self.structure.blocks, self.recipe.seq_len)

    @property
    def inputs(self) -> int:
        """Values of the widest input of a linear for one sample. The widest linears of a model in stages may be where
        tokens are fewest."""
        return max(self.flow.tokens[spec.block] * spec.in_features for spec in self.structure.linears)

    @property
    def activations(self) -> int:
        """Activations of a batch inside a block, and the float32 copy of a linear's input."""
        linears, tokens = self.structure.linears, self.flow.tokens
        widest = max(tokens[spec.block] * max(spec.in_features, spec.out_features) for spec in linears)
        itemsize = self.source.dtype.itemsize
        return self.recipe.batch_size * (_ACTIVATION_COPIES * widest * itemsize + 4 * self.inputs)

    @property
    def hidden(self) -> int:
        """Hidden states of all samples between two blocks."""
        return self.recipe.samples * self.flow.values * self.source.dtype.itemsize

    @property
    def token_weights(self) -> int:
        """Weights of a loss-aware Hessian."""
        return token_weight_bytes(self.recipe, self.flow, self.structure.linears) if self.recipe.loss_aware else 0

    @cached_property
    def solving(self) -> int:
        """One block with the moments of its inputs, and a batch, the solver's copies or the tuning of the block."""
        recipe, linears = self.recipe, self.structure.linears
        # Width and rows of the linears that read one input, by block; a block may have none left.
        inputs = [
            [(key[2], rows) for key, rows in self.tall.items() if key[0] == depth] for depth in range(len(self.blocks))
        ]
        squares = [[width**2 for width, _ in block] for block in inputs]
        gathered = max(max(block, default=0) if recipe.true_sequential else sum(block) for block in squares)
        moments = 4 * (2 if recipe.compares_inputs else 1) * gathered
        if recipe.true_sequential:
            # Those of experts side by side.
            moments = max(moments, min(_expert_bytes(linears, cross=recipe.compares_inputs), ROOM_BYTES) // COPIES)
        # A batch's inputs in the original, as they are read and in float32.
        itemsize = self.source.dtype.itemsize
        recalled = recipe.batch_size * (itemsize + 4) * self.inputs if recipe.compares_inputs else 0
        # Sums of a shard, of all shards, and in the end the moments themselves.
        gathering = max(2 * moments + self.activations + recalled, 3 * moments)
        tuning = 0
        if recipe.reconstruct_epochs:
            weights = max(sum(width * rows for width, rows in block) for block in inputs)
            tuning = _TUNING_BYTES * weights + _TUNING_ACTIVATIONS * self.activations
        # Asymmetric calibration and reconstruction keep the block again as it is in the original.
        blocks = versions_kept(recipe) * self.block
        return max(self.reading, blocks + max(gathering, moments + self.solver, tuning))


def starting(sizes: RunSizes) -> int:
    """Embeddings and one block while the inputs of the first block and of the head are made, and gradients where the
    loss counts."""
    first = sizes.outside + max(sizes.codes, max(sizes.reading, sizes.block + sizes.activations) + sizes.walked)
    if not sizes.recipe.loss_aware:
        return first
    # Squared gradients, and their powers, in addition to the inputs of the blocks.
    return first + 2 * sizes.token_weights + min(GRADIENT_BYTES, len(sizes.blocks) * sizes.hidden)


def quantizing(sizes: RunSizes) -> int:
    """One block and its solver, and the weights of tokens."""
    return sizes.solving + sizes.token_weights


def choosing_bits(sizes: RunSizes) -> int:
    """Sensitivities: one block and its solver, hidden states in memory, block inputs for gradients, and what is outside
    the blocks once more in float32; or the largest table and a tile of it, where its form is chosen."""
    if not sizes.recipe.allocates:
        return 0
    outside = sizes.outside + sizes.outside_in_float32
    probed = sizes.hidden / gradient_stride(sizes.recipe.samples, max(sizes.flow.tokens))
    gradients = min(GRADIENT_BYTES, len(sizes.blocks) * probed)
    layers = sizes.solving + sizes.hidden + gradients
    return int(outside + max(layers, sizes.trial))


def distilling(sizes: RunSizes) -> int:
    """Decoded blocks, the inputs of all blocks for a batch, and the head of the original beside the compressed one."""
    if not sizes.recipe.distill_epochs:
        return 0
    decoded = min(DECODED_BYTES, sum(sizes.blocks)) + sizes.block
    inputs = sizes.recipe.batch_size * len(sizes.blocks) * sizes.flow.values * sizes.source.dtype.itemsize
    slices = DISTILLED_SLICE_BYTES if sizes.vocabulary else 0
    return sizes.outside + sizes.heads + decoded + inputs + max(_TUNING_ACTIVATIONS * sizes.activations, slices)


def loading_tokenizer(sizes: RunSizes) -> int:
    """The vocabulary while it is read."""
    return _VOCABULARY_ENTRY_BYTES * sizes.vocabulary


def writing_text(sizes: RunSizes) -> int:
    """The whole model, and the pieces of calibration text that it writes at once."""
    requests = [] if sizes.source.reads_images else written_by_model(sizes.recipe)
    return max((writing_bytes(sizes.source, request) for request in requests), default=0)


def checking(sizes: RunSizes) -> int:
    """A sample's predictions, compared while blocks run one by one, and while the result is loaded."""
    return sizes.logits + max(sizes.outside + sizes.reading, sizes.loaded)


def without_data(sizes: RunSizes) -> int:
    """A run that reads no calibration data: tables, a block, and the solver's copies."""
    return max(sizes.outside + sizes.codes, sizes.reading, sizes.block + sizes.solver)


CALIBRATED: tuple[Callable[[RunSizes], int], ...] = (
    loading_tokenizer,
    writing_text,
    starting,
    choosing_bits,
    quantizing,
    distilling,
    checking,
)
UNCALIBRATED: tuple[Callable[[RunSizes], int], ...] = (loading_tokenizer, without_data, checking)


def peak_memory(
    source: Source,
    structure: Structure,
    tables: Sequence[PlannedTable],
    recipe: Recipe,
    loaded_bytes: int,
) -> int:
    """Expected peak resident memory, in bytes, of the process that runs `source`.

    That is what is resident now, what any model loads later, and the largest of the stages, with some slack; or the
    peak so far. Hidden states are on disk except while gradients and sensitivities are measured.

    loaded_bytes: of the result, which is loaded at the end.
    """
    sizes = RunSizes(source, structure, tables, recipe, loaded_bytes)
    present, stages = _status("VmRSS") or resident_bytes(), UNCALIBRATED
    if recipe.calibration != NO_CALIBRATION:
        present, stages = present + recipe.samples * sizes.flow.sample_bytes, CALIBRATED
    expected = present + _LATER_BYTES + max(stage(sizes) for stage in stages)
    return max(resident_bytes(), int(_SLACK * expected))


def _expert_bytes(linears: Sequence[LinearSpec], *, cross: bool) -> int:
    """What gathering the moments of alike inputs of all experts of a mixture takes, where that is most."""
    found: Counter[tuple[int, str | None, str]] = Counter()
    for each in linears:
        if each.experts is not None:
            alike = (each.block, each.experts, each.kind.rpartition(".")[2])
            found[alike] += expert_bytes(each.in_features, cross=cross)
    return max(found.values(), default=0)


def _module_bytes(module: nn.Module) -> int:
    return sum(each.numel() * each.element_size() for each in module.parameters())


def resident_bytes() -> int:
    """Peak resident memory of this process so far, in bytes."""
    # Not ru_maxrss where this is known: Linux hands a process the peak of the one that started it, at exec.
    if peak := _status("VmHWM"):
        return peak
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


def _status(field: str) -> int | None:
    """Bytes of a field of this process's status, on Linux."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    line = re.search(rf"^{field}:\s*(\d+) kB", status.read_text(), flags=re.MULTILINE)
    return 1024 * int(line[1]) if line else None
