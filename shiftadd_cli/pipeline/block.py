"""Quantize one block: its linears in the order they run, each group that reads one tensor together."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from shiftadd_cli.bcq.choices import Choice
from shiftadd_cli.bcq.solver import Solution, quantize_matrices
from shiftadd_cli.blockwise.block_runner import BlockStream
from shiftadd_cli.blockwise.input_cache import InputCache
from shiftadd_cli.calibration.hessian import Inputs, Moments, gather_moments
from shiftadd_cli.calibration.mixtures import Group, enough_tokens, in_room, in_turns
from shiftadd_cli.distributed.team import ALONE, Team
from shiftadd_cli.pipeline.account import PhaseClock
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.reconstruction.block import Reconstruction, reconstruct_block
from shiftadd_cli.report.schema import BlockReport
from shiftadd_cli.source import LinearSpec


class BlockQuantizer:
    """`block`, on its device, and its linears `specs`; afterwards it computes with the decoded weights."""

    def __init__(
        self,
        block: nn.Module,
        specs: Sequence[LinearSpec],
        recipe: Recipe,
        clock: PhaseClock,
        token_weights: Mapping[str, Tensor] | None = None,
        bits: Mapping[str, Choice] | None = None,
        team: Team = ALONE,
        shared: Collection[str] = (),
    ) -> None:
        """token_weights: by full name of a linear, float32 `[samples, tokens]`, see `calibration.gradients`.
        bits: by full name of a linear, where the recipe's primitive and bits are not meant for all. shared: parameters
        of the block that are stored in another one, and not to be tuned here."""
        self.block, self.recipe, self.clock, self.team, self.shared = block, recipe, clock, team, shared
        self.specs: Mapping[str, LinearSpec] = {spec.kind: spec for spec in specs}
        self.token_weights = token_weights
        self.options = recipe.solver_options
        self.bits = {spec.kind: recipe.choice if bits is None else bits[spec.name] for spec in specs}
        self.solutions: dict[str, Solution] = {}
        # Calibration tokens that each linear read.
        self.tokens = dict.fromkeys(self.specs, 0)

    def without_data(self) -> None:
        """Quantize every linear on its own, by its weights alone."""
        with self.clock.phase("solve"):
            for kind in self.specs:
                self._solve((kind,), None)

    def on(self, stream: BlockStream) -> None:
        """Quantize on the inputs of `stream`; linears that no input reaches, or of an expert that too few do (see
        `calibration.mixtures`), by their weights alone."""
        self._in_order(stream, self._turns(stream), None)

    def towards(self, original: BlockStream, stream: BlockStream, name: str, recall: InputCache) -> None:
        """The same, with asymmetric calibration: `original` is the block `name` as it was, and the hidden states of the
        original model, which advance to its outputs; `recall` keeps what its linears read."""
        turns = self._turns(stream)
        with self.clock.phase("forward"):
            mixtures = {each.experts for each in self.specs.values() if each.experts is not None}
            names = [*sorted(mixtures), *(group[0] for turn in turns for group in turn)]
            recall.advance(original, names, name, self.team)
        self._in_order(stream, turns, recall)

    def _turns(self, stream: BlockStream) -> list[list[Group]]:
        with self.clock.phase("forward"):
            groups = stream.shared_inputs(list(self.specs), self.team)
        turns = in_turns(groups, list(self.specs.values()))
        if not self.recipe.true_sequential:
            return [[group for turn in turns for group in turn]]
        cross = bool(self.recipe.asymmetric)
        return [part for turn in turns for part in in_room(turn, list(self.specs.values()), cross=cross)]

    def _in_order(self, stream: BlockStream, turns: list[list[Group]], original: Inputs | None) -> None:
        for turn in turns:
            with self.clock.phase("forward"):
                moments = gather_moments(stream, turn, original, self._weights(turn), self.team)
            with self.clock.phase("solve"):
                for group, each in zip(turn, moments, strict=True):
                    self.tokens |= dict.fromkeys(group, each.tokens)
                    if enough_tokens(self.specs[group[0]], each.tokens):
                        self._solve(group, each)
            if stream.playback is not None:
                stream.playback.finish(self.solutions)
        with self.clock.phase("solve"):
            for kind in self.specs:
                if kind not in self.solutions:
                    self._solve((kind,), None)

    def _weights(self, groups: Sequence[Group]) -> list[Tensor | None] | None:
        """Token weights of each group: linears that read one tensor share the mean of theirs, and so one moment. Those
        of experts have none."""
        if self.token_weights is None:
            return None
        weights: list[Tensor | None] = []
        for group in groups:
            members = [self.specs[kind] for kind in group]
            known = [self.token_weights[spec.name] for spec in members if spec.experts is None]
            weights.append(torch.stack(known).mean(0) if known else None)
        return weights

    def reconstruct(self, name: str, stream: BlockStream, original: BlockStream) -> BlockReport | None:
        """Tune the quantized block `name`, if that helps, towards `original`, which has advanced to its outputs.

        Every step of it needs the one before, so the first process of a team does it alone; the others have no report.
        """
        with self.clock.phase("reconstruct"):
            result = self._reconstruction(stream, original) if self.team.first else None
            tuned = self.team.share_tensors(None if result is None else _as_tensors(result))
        weights: dict[str, dict[str, Tensor]] = {}
        for path, tensor in tuned.items():
            place, slash, suffix = path.partition("/")
            if slash:
                weights.setdefault(place, {})[suffix] = tensor.to(stream.device)
            else:
                self.block.get_parameter(place).data = tensor.to(stream.device)
        for kind, tensors in weights.items():
            solution = self.solutions[kind]
            self._put(kind, replace(solution, weight=replace(solution.weight, tensors=tensors)))
        if result is None:
            return None
        return BlockReport(
            name=name, error_before=result.error_before, error_after=result.error_after, kept=result.kept
        )

    def _reconstruction(self, stream: BlockStream, original: BlockStream) -> Reconstruction:
        return reconstruct_block(
            stream,
            original.hidden,
            {kind: solution.weight for kind, solution in self.solutions.items()},
            {kind: spec.matrix(original.block).float() for kind, spec in self.specs.items()},
            [kind for kind, spec in self.specs.items() if spec.transposed],
            epochs=self.recipe.reconstruct_epochs,
            seed=self.recipe.seed,
            fixed=self.shared,
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
            solutions = quantize_matrices(weights, names, None, options.without_data(), team=self.team)
        elif self._biases_take_the_mean(kinds):
            about = moments.about_mean()
            solutions = quantize_matrices(weights, names, about.hessian, options, about.cross, self.team)
            for kind, weight, solution in zip(kinds, weights, solutions, strict=True):
                shift = (weight.float() - solution.weight.decode()) @ moments.mean
                if moments.cross_mean is not None:
                    shift += self.recipe.asymmetric * weight.float() @ (moments.cross_mean - moments.mean)
                bias = self.block.get_submodule(kind).get_parameter("bias")
                bias.data = (bias.float() + shift).to(bias.dtype)
        else:
            solutions = quantize_matrices(weights, names, moments.hessian, options, moments.cross, self.team)
        for kind, solution in zip(kinds, solutions, strict=True):
            self._put(kind, solution)

    def _biases_take_the_mean(self, kinds: Sequence[str]) -> bool:
        """Whether the linears have biases to correct (Nagel et al. 2019, arXiv:1906.04721, section 4.2): these take
        over the mean of the error, also of what asymmetric calibration aims at, weights fit inputs about theirs."""
        modules = [self.block.get_submodule(kind) for kind in kinds]
        return self.recipe.bias_correction and all(getattr(module, "bias", None) is not None for module in modules)

    def _put(self, kind: str, solution: Solution) -> None:
        self.solutions[kind] = solution
        _replace(self.block.get_submodule(kind), solution.weight.decode(), self.specs[kind])


def _as_tensors(result: Reconstruction) -> dict[str, Tensor]:
    """What was tuned, by path and suffix with a slash between, which no name of a parameter has, or by name."""
    found = dict(result.parameters)
    for kind, weight in result.weights.items():
        found |= {f"{kind}/{suffix}": tensor for suffix, tensor in weight.tensors.items()}
    return found


def _replace(module: nn.Module, weight: Tensor, spec: LinearSpec) -> None:
    """Put `weight` `[out, in]` in the place of the module's own, in its layout and dtype."""
    parameter = module.get_parameter("weight")
    parameter.data = spec.turned(weight).contiguous().to(parameter.dtype)
