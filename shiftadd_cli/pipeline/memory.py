"""Memory of a run: what it is expected to take, and what a process took."""

from __future__ import annotations

import os
import re
import resource
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from shiftadd_cli.allocation.sensitivity import gradient_stride
from shiftadd_cli.blockwise.flow import Flow, measure_flow
from shiftadd_cli.blockwise.passage import BYTES_PER_LOGIT, LOGIT_BYTES
from shiftadd_cli.calibration.gradients import MEMORY_BYTES as GRADIENT_BYTES
from shiftadd_cli.calibration.mixtures import COPIES, ROOM_BYTES, expert_bytes
from shiftadd_cli.distillation.end import SLICE_BYTES as DISTILLED_SLICE_BYTES
from shiftadd_cli.distillation.stack import MEMORY_BYTES as DECODED_BYTES
from shiftadd_cli.pipeline.tables import PlannedTable
from shiftadd_cli.recipe import NO_CALIBRATION, Recipe
from shiftadd_cli.self_text.write import writing_bytes, written_by_model
from shiftadd_cli.source import LinearSpec, Source, Structure
from shiftadd_cli.source.experts import has_split_experts

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
# Where Linux says how much memory a container may take, by the version of its control groups.
_CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def machine_memory() -> int:
    """Bytes of memory that processes here may have in all: those of the machine, or fewer where a container has a
    limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _CONTAINER_LIMITS:
        # Without a limit the file says "max", or a number beyond any machine.
        if path.is_file() and (text := path.read_text().strip()).isdecimal():
            total = min(total, int(text))
    return total


def versions_kept(recipe: Recipe) -> int:
    """Models that hidden states are kept of: the one being quantized, and the original where it is aimed at."""
    return 2 if recipe.follows_original else 1


def token_weight_bytes(recipe: Recipe, flow: Flow, linears: Sequence[LinearSpec]) -> int:
    """Of one float32 weight for each token and linear."""
    return 4 * recipe.samples * sum(flow.tokens[each.block] for each in linears if each.experts is None)


def peak_memory(
    source: Source,
    structure: Structure,
    tables: Sequence[PlannedTable],
    recipe: Recipe,
    loaded_bytes: int,
) -> int:
    """Expected peak resident memory of the process that runs `source`, in bytes. loaded_bytes: of the result, which is
    loaded at the end.

    What is resident now and will be loaded for any model, and the larger of two moments, with some slack: embeddings
    and one block while the first inputs are made; one block with its moments, and a batch or the solver's copies.
    Hidden states are on disk, but while gradients, or what bits matter to each layer, are measured. Asymmetric
    calibration and block reconstruction keep the block again as it is in the original. Distillation keeps decoded
    blocks, and the inputs of all blocks for a batch.
    """
    model, linears = source.skeleton(), structure.linears
    blocks = {name: model.get_submodule(name) for name in structure.blocks}
    block = max(_module_bytes(module) for module in blocks.values())
    # Stacks of experts are put together from what is stored, and cut up: 1.6 to 2.0 times the block, as measured.
    reading = 2 * block if has_split_experts(model) else block
    outside = source.model_bytes - sum(_module_bytes(module) for module in blocks.values())
    # Codes are made beside the matrix they stand for, before any block is loaded.
    codes = max((each.nbytes for each in tables), default=0)
    tall: dict[tuple[int, str, int], int] = {}
    for each in linears:
        siblings = (each.block, each.kind.rpartition(".")[0], each.in_features)
        tall[siblings] = tall.get(siblings, 0) + each.out_features
    solver = 4 * max(_MATRIX_COPIES * rows * key[2] + _HESSIAN_COPIES * key[2] ** 2 for key, rows in tall.items())
    vocabulary = 0 if source.reads_images else source.config.get_text_config().vocab_size
    resident = resident_bytes() + _LATER_BYTES + _VOCABULARY_ENTRY_BYTES * vocabulary
    # A sample's predictions are compared where blocks run one by one, and where the result is loaded.
    logits = min(LOGIT_BYTES, recipe.seq_len * vocabulary * BYTES_PER_LOGIT)
    checking = logits + max(outside + reading, loaded_bytes)
    if recipe.calibration == NO_CALIBRATION:
        return int(_SLACK * (resident + max(outside + codes, reading, block + solver, checking)))
    versions = versions_kept(recipe)
    flow = measure_flow(source, structure.blocks, recipe.seq_len)
    itemsize = source.dtype.itemsize
    # By block, since the widest linears of a model in stages are where tokens are fewest.
    wide = max(flow.tokens[each.block] * max(each.in_features, each.out_features) for each in linears)
    read = max(flow.tokens[each.block] * each.in_features for each in linears)
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
        slices = DISTILLED_SLICE_BYTES if vocabulary else 0
        distilling = outside + decoded + inputs_of_blocks + max(through, slices)
    starting = outside + max(codes, reading, block + activations)
    running = max(reading, versions * block + max(gathering, solving, tuning))
    token_weights = 0
    if recipe.loss_aware:
        token_weights = token_weight_bytes(recipe, flow, linears)
        # Squared gradients, and their powers, beside the inputs of the blocks.
        starting += 2 * token_weights + min(GRADIENT_BYTES, len(blocks) * hidden)
    measuring = 0.0
    if recipe.avg_bits is not None:
        probed = hidden / gradient_stride(recipe.samples, max(flow.tokens))
        measuring = outside + running + hidden + min(GRADIENT_BYTES, len(blocks) * probed)
    requests = [] if source.reads_images else written_by_model(recipe)
    writing = max((writing_bytes(source, request) for request in requests), default=0)
    moments_of_run = (starting, running + token_weights, distilling, measuring, checking, writing)
    return int(_SLACK * (resident + pixels + max(moments_of_run)))


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
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), flags=re.MULTILINE)):
        return 1024 * int(found[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
