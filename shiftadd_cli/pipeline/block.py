"""Quantize one block: its linears in execution order, with those that read one tensor as a group."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from shiftadd_cli.bcq.choices import Choice
from shiftadd_cli.bcq.options import SolverOptions
from shiftadd_cli.bcq.solver import Solution, quantize_matrices
from shiftadd_cli.blockwise.block_runner import BlockStream
from shiftadd_cli.blockwise.input_cache import InputCache
from shiftadd_cli.blockwise.junctions import find_junctions
from shiftadd_cli.calibration.hessian import Moments, gather_moments
from shiftadd_cli.calibration.mixtures import Group, enough_tokens, in_room, in_turns
from shiftadd_cli.distributed.team import ALONE, Team
from shiftadd_cli.pipeline.account import PhaseClock
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.reconstruction.block import Reconstruction, reconstruct_block
from shiftadd_cli.report.schema import BlockReport
from shiftadd_cli.source import LinearSpec


class BlockQuantizer:
    """Quantizes the linears `specs` of `block`, on its device; afterwards the block computes with decoded weights."""

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
        bits: by full name of a linear, if the recipe's primitive and bits do not apply to all. shared: parameters of
        the block that are stored in another block and not tuned here."""
        self.block, self.recipe, self.clock, self.team, self.shared = block, recipe, clock, team, shared
        self.specs: Mapping[str, LinearSpec] = {spec.kind: spec for spec in specs}
        self.token_weights = token_weights
        self.options = recipe.solver_options
        self.bits = {spec.kind: recipe.choice if bits is None else bits[spec.name] for spec in specs}
        self.solutions: dict[str, Solution] = {}
        # Number of calibration tokens that each linear read.
        self.tokens = dict.fromkeys(self.specs, 0)

    def without_data(self) -> None:
        """Quantize every linear separately, on its weights alone."""
        with self.clock.phase("solve"):
            for kind in self.specs:
                self._solve([kind], self.options.at(self.bits[kind]), None)

    def on(self, stream: BlockStream, original: InputCache | None = None) -> None:
        """Quantize on the inputs of `stream`. Linears that get no input, or belong to an expert with too few tokens
        (see `calibration.mixtures`), are quantized on their weights alone.

        original: of the unquantized block, to compare inputs and hidden states with; its hidden states advance to its
        outputs.
        """
        turns = self._turns(stream)
        junctions: dict[str, str] = {}
        if original is not None:
            with self.clock.phase("forward"):
                if self.recipe.drift:
                    junctions = self._junctions(stream, turns)
                mixtures = {spec.experts for spec in self.specs.values() if spec.experts is not None}
                read = [group[0] for turn in turns for group in turn]
                original.advance([*sorted(mixtures), *dict.fromkeys([*read, *filter(None, junctions.values())])])
        for turn in turns:
            with self.clock.phase("forward"):
                turn_moments = gather_moments(stream, turn, original, self._weights(turn), junctions)
            with self.clock.phase("solve"):
                for group, moments in zip(turn, turn_moments, strict=True):
                    self.tokens |= dict.fromkeys(group, moments.tokens)
                    if enough_tokens(self.specs[group[0]], moments.tokens):
                        for kinds, options in self._alike(group):
                            self._solve(kinds, options, moments)
            if stream.playback is not None:
                stream.playback.finish(self.solutions)
        with self.clock.phase("solve"):
            for kind in self.specs:
                if kind not in self.solutions:
                    self._solve([kind], self.options.at(self.bits[kind]), None)

    def _turns(self, stream: BlockStream) -> list[list[Group]]:
        with self.clock.phase("forward"):
            groups = stream.shared_inputs(list(self.specs))
        turns = in_turns(groups, list(self.specs.values()))
        if not self.recipe.true_sequential:
            return [[group for turn in turns for group in turn]]
        cross = bool(self.recipe.asymmetric)
        return [part for turn in turns for part in in_room(turn, list(self.specs.values()), cross=cross)]

    def _junctions(self, stream: BlockStream, turns: Sequence[Sequence[Group]]) -> dict[str, str]:
        """Where linears that read an input alone join the hidden states. The outputs of experts are weighted and
        summed first."""
        alone = [group[0] for turn in turns for group in turn if len(group) == 1]
        return find_junctions(stream, [kind for kind in alone if self.specs[kind].experts is None])

    def _weights(self, groups: Sequence[Group]) -> list[Tensor | None] | None:
        """Token weights of each group. Linears that read one tensor share the mean of their weights, and so one moment.
        Linears of experts have none."""
        if self.token_weights is None:
            return None
        weights: list[Tensor | None] = []
        for group in groups:
            members = [self.specs[kind] for kind in group]
            own = [self.token_weights[spec.name] for spec in members if spec.experts is None]
            weights.append(torch.stack(own).mean(0) if own else None)
        return weights

    def reconstruct(self, stream: BlockStream, original: BlockStream) -> BlockReport | None:
        """Tune the quantized block towards `original`, which has advanced to its outputs, if that helps.

        Every step needs the one before, so the first process of a team does it alone; the others return no report.
        """
        with self.clock.phase("reconstruct"):
            result = self._reconstruction(stream, original) if self.team.first else None
            tuned = self.team.share_tensors(None if result is None else _as_tensors(result))
        weights: dict[str, dict[str, Tensor]] = {}
        for path, tensor in tuned.items():
            target, slash, suffix = path.partition("/")
            if slash:
                weights.setdefault(target, {})[suffix] = tensor.to(stream.device)
            else:
                self.block.get_parameter(target).data = tensor.to(stream.device)
        for kind, tensors in weights.items():
            solution = self.solutions[kind]
            self._put(kind, replace(solution, weight=replace(solution.weight, tensors=tensors)))
        if result is None:
            return None
        return BlockReport(
            name=stream.name, error_before=result.error_before, error_after=result.error_after, kept=result.kept
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

    def _alike(self, group: Group) -> Iterator[tuple[list[str], SolverOptions]]:
        """The linears of a group by their bits, with the options for these."""
        for bits in dict.fromkeys(self.bits[kind] for kind in group):
            yield [kind for kind in group if self.bits[kind] == bits], self.options.at(bits)

    def _solve(self, kinds: Sequence[str], options: SolverOptions, moments: Moments | None) -> None:
        """Quantize linears that read one input, and replace their weights by the decoded ones."""
        weights = [self.specs[kind].matrix(self.block) for kind in kinds]
        names = [self.specs[kind].name for kind in kinds]
        if moments is None:
            solutions = quantize_matrices(weights, names, None, options.without_data(), team=self.team)
        elif self._biases_take_the_mean(kinds):
            centered = moments.about_mean()
            solutions = self._solutions(weights, names, options, centered)
            for kind, weight, solution in zip(kinds, weights, solutions, strict=True):
                shift = (weight.float() - solution.weight.decode()) @ moments.mean
                if moments.drift_mean is not None:
                    shift += self.recipe.drift * moments.drift_mean
                elif moments.cross_mean is not None:
                    shift += self.recipe.asymmetric * weight.float() @ (moments.cross_mean - moments.mean)
                bias = self.block.get_submodule(kind).get_parameter("bias")
                bias.data = (bias.float() + shift).to(bias.dtype)
        else:
            solutions = self._solutions(weights, names, options, moments)
        for kind, solution in zip(kinds, solutions, strict=True):
            self._put(kind, solution)

    def _solutions(
        self, weights: Sequence[Tensor], names: Sequence[str], options: SolverOptions, moments: Moments
    ) -> list[Solution]:
        return quantize_matrices(
            weights, names, moments.hessian, options, moments.cross, self.team, drift=moments.drift
        )

    def _biases_take_the_mean(self, kinds: Sequence[str]) -> bool:
        """Whether the linears have biases to correct (Nagel et al. 2019, arXiv:1906.04721, section 4.2). If so, the
        biases absorb the mean error, also that of the asymmetric target, and the weights fit the centered inputs."""
        modules = [self.block.get_submodule(kind) for kind in kinds]
        return self.recipe.bias_correction and all(getattr(module, "bias", None) is not None for module in modules)

    def _put(self, kind: str, solution: Solution) -> None:
        self.solutions[kind] = solution
        _replace(self.block.get_submodule(kind), solution.weight.decode(), self.specs[kind])


def _as_tensors(result: Reconstruction) -> dict[str, Tensor]:
    """The tuned tensors: weights by path/suffix, where the slash occurs in no parameter name; the others by name."""
    tensors = dict(result.parameters)
    for kind, weight in result.weights.items():
        tensors |= {f"{kind}/{suffix}": tensor for suffix, tensor in weight.tensors.items()}
    return tensors


def _replace(module: nn.Module, weight: Tensor, spec: LinearSpec) -> None:
    """Replace the module's weight by `weight` `[out, in]`, in the module's layout and dtype."""
    parameter = module.get_parameter("weight")
    parameter.data = spec.turned(weight).contiguous().to(parameter.dtype)
