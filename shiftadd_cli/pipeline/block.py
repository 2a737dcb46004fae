"""Quantize one block: its linears in the order they run, each group that reads one tensor together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from shiftadd_cli.bcq.choices import Choice, choice_of
from shiftadd_cli.bcq.solver import Solution, SolverOptions, quantize_matrices
from shiftadd_cli.calibration.hessian import Moments, gather_moments
from shiftadd_cli.calibration.stream import BlockStream
from shiftadd_cli.pipeline.account import Measured
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.reconstruction.block import reconstruct_block
from shiftadd_cli.report.schema import BlockReport
from shiftadd_cli.source import LinearSpec


class BlockQuantizer:
    """`block`, on its device, and its linears `specs`; afterwards it computes with the decoded weights."""

    def __init__(
        self,
        block: nn.Module,
        specs: Sequence[LinearSpec],
        recipe: Recipe,
        clock: Measured,
        token_weights: Mapping[str, Tensor] | None = None,
        bits: Mapping[str, Choice] | None = None,
    ) -> None:
        """token_weights: by full name of a linear, float32 `[samples, tokens]`, see `calibration.gradients`.
        bits: by full name of a linear, where the recipe's primitive and bits are not meant for all."""
        self.block, self.recipe, self.clock = block, recipe, clock
        self.specs: Mapping[str, LinearSpec] = {spec.kind: spec for spec in specs}
        self.token_weights = token_weights
        self.options = SolverOptions.from_recipe(recipe)
        usual = choice_of(recipe.primitive, recipe.bits)
        self.bits = {spec.kind: usual if bits is None else bits[spec.name] for spec in specs}
        self.solutions: dict[str, Solution] = {}

    def without_data(self) -> None:
        """Quantize every linear on its own, by its weights alone."""
        with self.clock.phase("solve"):
            for kind in self.specs:
                self._solve((kind,), None)

    def on(self, stream: BlockStream, original: BlockStream | None) -> None:
        """Quantize on the inputs of `stream`; linears that no input reaches by their weights alone.

        original: the block as it was and the hidden states of the original model, for asymmetric calibration.
        """
        with self.clock.phase("forward"):
            groups = stream.shared_inputs(list(self.specs))
        for part in [[group] for group in groups] if self.recipe.true_sequential else [groups]:
            with self.clock.phase("forward"):
                moments = gather_moments(stream, part, original, self._weights(part))
            with self.clock.phase("solve"):
                for group, each in zip(part, moments, strict=True):
                    self._solve(group, each)
        with self.clock.phase("solve"):
            for kind in self.specs:
                if kind not in self.solutions:
                    self._solve((kind,), None)

    def _weights(self, groups: Sequence[tuple[str, ...]]) -> list[Tensor] | None:
        """Token weights of each group: linears that read one tensor share the mean of theirs, and so one moment."""
        if self.token_weights is None:
            return None
        return [torch.stack([self.token_weights[self.specs[kind].name] for kind in group]).mean(0) for group in groups]

    def reconstruct(self, name: str, stream: BlockStream, original: BlockStream) -> BlockReport:
        """Tune the quantized block `name`, if that helps, towards `original`, which has advanced to its outputs."""
        with self.clock.phase("reconstruct"):
            result = reconstruct_block(
                stream,
                original.hidden,
                {kind: solution.weight for kind, solution in self.solutions.items()},
                {kind: spec.matrix(original.block).float() for kind, spec in self.specs.items()},
                [kind for kind, spec in self.specs.items() if spec.transposed],
                epochs=self.recipe.reconstruct_epochs,
                seed=self.recipe.seed,
            )
        for kind, weight in result.weights.items():
            self._put(kind, replace(self.solutions[kind], weight=weight))
        for vector, value in result.parameters.items():
            self.block.get_parameter(vector).data = value
        return BlockReport(
            name=name, error_before=result.error_before, error_after=result.error_after, kept=result.kept
        )

    def _solve(self, kinds: Sequence[str], moments: Moments | None) -> None:
        """Quantize linears that read one input and put the decoded weights in their place."""
        for bits in dict.fromkeys(self.bits[kind] for kind in kinds):
            self._solve_alike([kind for kind in kinds if self.bits[kind] == bits], moments, bits)

    def _solve_alike(self, kinds: Sequence[str], moments: Moments | None, bits: Choice) -> None:
        options = self.options.at(bits)
        weights = [self.specs[kind].matrix(self.block) for kind in kinds]
        names = [self.specs[kind].name for kind in kinds]
        if moments is None:
            solutions = quantize_matrices(weights, names, None, options.without_data())
        elif self._biases_take_the_mean(kinds, moments):
            solutions = quantize_matrices(weights, names, moments.about_mean(), options)
            for kind, weight, solution in zip(kinds, weights, solutions, strict=True):
                error = weight.float() - solution.weight.decode()
                bias = self.block.get_submodule(kind).get_parameter("bias")
                bias.data = (bias.float() + error @ moments.mean).to(bias.dtype)
        else:
            solutions = quantize_matrices(weights, names, moments.hessian, options, moments.cross)
        for kind, solution in zip(kinds, solutions, strict=True):
            self._put(kind, solution)

    def _biases_take_the_mean(self, kinds: Sequence[str], moments: Moments) -> bool:
        """Whether the linears have biases to be corrected (Nagel et al. 2019, arXiv:1906.04721, section 4.2). What
        asymmetric calibration aims at has another mean."""
        modules = [self.block.get_submodule(kind) for kind in kinds]
        biased = all(getattr(module, "bias", None) is not None for module in modules)
        return self.recipe.bias_correction and moments.cross is None and biased

    def _put(self, kind: str, solution: Solution) -> None:
        self.solutions[kind] = solution
        _replace(self.block.get_submodule(kind), solution.weight.decode(), self.specs[kind])


def _replace(module: nn.Module, weight: Tensor, spec: LinearSpec) -> None:
    """Put `weight` `[out, in]` in the place of the module's own, in its layout and dtype."""
    parameter = module.get_parameter("weight")
    parameter.data = spec.turned(weight).contiguous().to(parameter.dtype)
