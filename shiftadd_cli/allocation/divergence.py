"""Divergence of the model's predictions from the original's when a single linear is quantized.

For every linear and every number of bits, KL(original || model with only this linear replaced) is measured, not
estimated, in nats per token, over all tokens of a few probe windows. A *variant* is the model with one linear replaced.
Before the block of that linear it equals the original, so only its states after this block are stored, and only the
later blocks are run again:

    through    block 0      block 1         block 2              norm, head
               original  →  original     →  original          →  reference
                            variants     →  variants          →  divergences
                            of block 0      of blocks 0, 1

The walk over the blocks that solves the linears also advances the variants. Each block is read once, and all variants
of earlier blocks pass through it along with the original, one after another, since the probe windows of one variant
already keep the processor busy. Their float32 hidden states take at most `MEMORY_BYTES` (but at least one variant is
stored). When the next variant does not fit, all live variants run to the end of the model, which reads the later blocks
once more, and free their memory. So a block is read at most once more than the number of such groups, which is
linears x candidates x windows x seq_len x width x 4 / MEMORY_BYTES. Logits are computed for some tokens of one variant
at a time, and for the same tokens of the original.

The run time is that of linears x candidates x (half the model) forward passes of the probe windows, and as many heads.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shiftadd_cli.allocation.candidates import CandidateSolver, relative_error
from shiftadd_cli.bcq.choices import Choice, choice_words
from shiftadd_cli.bcq.options import SolverOptions
from shiftadd_cli.blockwise.forward import hooked
from shiftadd_cli.blockwise.probe_model import ProbeModel
from shiftadd_cli.errors import NumericalError
from shiftadd_cli.source import LinearSpec

# Calibration windows, or images, used to measure divergences; the quantized weights are solved on all of them.
PROBE_WINDOWS = 4
# An image gives one prediction, a window gives hundreds.
PROBE_IMAGES = 64
# Default limit on the hidden states of variants.
MEMORY_BYTES = 1 << 30


def probe_samples(samples: Tensor) -> Tensor:
    """At most `PROBE_WINDOWS` of int64 `[samples, seq_len]`, or `PROBE_IMAGES` of `[samples, channels, height, width]`,
    evenly spaced from the first to the last."""
    most = PROBE_IMAGES if samples.is_floating_point() else PROBE_WINDOWS
    return samples[torch.linspace(0, len(samples) - 1, min(most, len(samples))).round().long()]


@dataclass
class _Variant:
    """`hidden` float32 `[windows, seq_len, width]`: states after the deepest block entered so far. `weight`: the
    replacement weight of the linear `spec`, if later blocks have copies of it."""

    spec: LinearSpec
    bits: Choice
    hidden: Tensor
    weight: Tensor | None = None


class Divergence:
    """Measures the linears block by block, in order; `costs` then returns the divergences."""

    def __init__(
        self,
        replay: ProbeModel,
        options: SolverOptions,
        candidates: Sequence[Choice],
        *,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        """replay: of the probe windows, whose team shares the variants; memory_bytes: upper limit on the live variants,
        of which there is at least one."""
        self._replay, self._structure = replay, replay.model.structure
        self._team, self._progress = replay.model.context.team, replay.model.context.progress
        self._solve = CandidateSolver(options, candidates, self._team)
        self._variants = 0
        self._room = max(1, memory_bytes // replay.hidden.nbytes)
        self._by_block: dict[int, list[LinearSpec]] = {}
        for spec in self._structure.linears:
            self._by_block.setdefault(spec.block, []).append(spec)
        # The original's states before and after the block entered last, number `_depth`.
        self._depth = -1
        self._inputs = self._outputs = replay.hidden
        self._held: list[_Variant] = []
        self._reached: set[str] = set()
        self._divergences: dict[str, dict[Choice, float]] = {}

    def __call__(
        self, specs: Sequence[LinearSpec], weights: Sequence[Tensor], hessian: Tensor | None
    ) -> list[dict[Choice, float]]:
        """Relative errors of linears of one block that read one input; see `sensitivity.Measure`."""
        self._enter(specs[0].block)
        errors: list[dict[Choice, float]] = [{} for _ in specs]
        for bits, solutions in self._solve([spec.name for spec in specs], weights, hessian):
            for spec, error, solution in zip(specs, errors, solutions, strict=True):
                error[bits] = relative_error(solution)
                if spec.name in self._reached:
                    if self._variants % self._team.size == self._team.rank:
                        self._add(spec, bits, solution.weight.decode())
                    self._variants += 1
        return errors

    def costs(self, errors: Mapping[str, dict[Choice, float]]) -> dict[str, dict[Choice, float]]:
        """Divergences in nats per token, finite and not negative, of all linears, given the relative errors of all.

        A linear that no probe token reached (in an expert that got no token) gets its relative error times the median
        divergence / error of the others at these bits: the model may depend on it even though nothing was measured.
        """
        nats = self.measured()
        return {
            name: nats[name] if name in nats else {bits: _usual(nats, errors, bits) * error[bits] for bits in error}
            for name, error in errors.items()
        }

    def measured(self) -> dict[str, dict[Choice, float]]:
        """Divergences in nats per token, by bits, of the linears that a probe token reached."""
        self._finish()
        # Gathered from all processes as pairs, since JSON has no integer keys.
        own = {name: list(by_bits.items()) for name, by_bits in self._divergences.items()}
        result: dict[str, dict[Choice, float]] = {}
        for part in self._team.gather(own):
            for name, pairs in part.items():
                result.setdefault(name, {}).update(pairs)
        return result

    def _enter(self, depth: int) -> None:
        """Run the original and all variants through the blocks up to number `depth`, which stays loaded."""
        while self._depth < depth:
            if self._depth >= 0:
                self._replay.model.release(self._depth)
            self._depth += 1
            block = self._replay.model.load(self._depth)
            self._inputs = self._outputs
            with self._noting_what_is_reached(block):
                self._outputs = self._replay.run(self._depth, self._inputs)
            self._advance(self._depth)

    def _advance(self, depth: int) -> None:
        block = self._replay.model.load(depth)
        for variant in self._held:
            copies = [block.get_submodule(kind) for number, kind in variant.spec.copies if number == depth]
            with ExitStack() as stack:
                for copy in copies:
                    assert variant.weight is not None, "a linear with copies keeps it"
                    stack.enter_context(_replaced(copy, variant.spec.turned(variant.weight)))
                variant.hidden = self._replay.run(depth, variant.hidden)

    def _add(self, spec: LinearSpec, bits: Choice, weight: Tensor) -> None:
        """Run the block with the linear's weight replaced, float32 `[out, in]`, and store the output as a variant."""
        if len(self._held) == self._room:
            self._finish()
        block = self._replay.model.load(spec.block)
        with _replaced(block.get_submodule(spec.kind), spec.turned(weight)):
            hidden = self._replay.run(spec.block, self._inputs)
        self._held.append(_Variant(spec, bits, hidden, weight if spec.copies else None))

    def _finish(self) -> None:
        """Run all variants to the end, record their divergences and drop them."""
        if not self._held:
            return
        original = self._outputs
        ahead = {name: depth for depth, name in enumerate(self._structure.blocks) if depth > self._depth}
        for name in self._progress(list(ahead), "Replaying") if ahead else ():
            self._replay.model.load(ahead[name])
            original = self._replay.run(ahead[name], original)
            self._advance(ahead[name])
            self._replay.model.release(ahead[name])
        variants, self._held = self._held, []
        divergences = self._replay.divergences(original, [variant.hidden for variant in variants])
        for variant, divergence in zip(variants, divergences, strict=True):
            if not math.isfinite(divergence):
                raise NumericalError(
                    f"The predictions are not finite when {variant.spec.name} has {choice_words(variant.bits)}; leave "
                    "it unquantized with `skip`, or fix the source."
                )
            self._divergences.setdefault(variant.spec.name, {})[variant.bits] = divergence

    @contextmanager
    def _noting_what_is_reached(self, block: nn.Module) -> Iterator[None]:
        """Record the linears of the block that process at least one token."""

        def note(name: str, inputs: Tensor) -> None:
            if inputs.numel():
                self._reached.add(name)

        specs = self._by_block.get(self._depth, [])
        modules = {spec.name: block.get_submodule(spec.kind) for spec in specs}
        handles = [
            module.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
            for name, module in modules.items()
        ]
        with hooked(handles):
            yield


def _usual(
    divergences: Mapping[str, dict[Choice, float]], errors: Mapping[str, dict[Choice, float]], bits: Choice
) -> float:
    """Median of divergence / relative error at these bits, over the linears with a nonzero error."""
    ratios = [
        divergence[bits] / errors[name][bits] for name, divergence in divergences.items() if errors[name][bits] > 0
    ]
    return statistics.median(ratios) if ratios else 1.0


@contextmanager
def _replaced(linear: nn.Module, weight: Tensor) -> Iterator[None]:
    parameter = linear.get_parameter("weight")
    original = parameter.data
    parameter.data = weight.to(original)
    try:
        yield
    finally:
        parameter.data = original
