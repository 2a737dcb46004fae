"""Sensitivity of each layer to its bits: the predicted loss of every linear at every number of bits.

`output`: to second order, and ignoring the coupling of different layers, output features and tokens, an error Δy of a
linear's output costs ½ Σ_o E[g_o²] E[Δy_o²] nats per token, where g is the gradient of the divergence from the original
at that output (see `calibration.gradients`). With g² averaged over features this is ½ E[g²] · tr[(W − Ŵ) H (W − Ŵ)ᵀ].
The error is the actual error of the solver that the run will use, without its most expensive steps (see `candidates`),
on a sample of the rows (see `row_sample`) and, as the caller decides, of the windows. The gradient is one number per
layer, so even fewer windows are enough for it. A factor for each kind of linear, from the divergences of a few,
corrects for the ignored coupling (see `anchors`).

`divergence`: the divergence between the original and the model with one linear replaced by the same solver's result, in
nats per token, measured on a few windows; see `divergence`. It ignores only the coupling of different layers.

`paper`: the criterion of ShiftAddLLM, C = ‖S‖_F · std(S)² with S = W / d by columns, d the diagonal of the upper
Cholesky factor of the inverse Hessian (its code, `*_analysis.py`; see also Optimal Brain Surgeon). The score does not
depend on bits: the paper's code gives the layers with the largest scores the larger of two numbers. Here it becomes the
cost C · 4^−bits, since every further plane divides the squared error of a scalar quantizer by about four. Layers are
ranked as in the paper, any candidates can be compared, and only differences within one plan are meaningful.

For a vision model the loss is per image: the divergence of its class scores in nats, or, for a model without class
scores, 1 - cosine of its features.

Everything is measured in the original model, whose blocks are read one after another.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from shiftadd_cli.allocation.anchors import ANCHOR_PLANES, anchored, choose_anchors
from shiftadd_cli.allocation.candidates import CandidateSolver
from shiftadd_cli.allocation.divergence import Divergence, probe_samples
from shiftadd_cli.allocation.row_sample import RowSample
from shiftadd_cli.bcq.choices import Choice
from shiftadd_cli.bcq.hessian import build_objective
from shiftadd_cli.bcq.options import SolverOptions
from shiftadd_cli.blockwise.block_runner import BlockStream
from shiftadd_cli.blockwise.model import BlockwiseModel
from shiftadd_cli.blockwise.probe_model import ProbeModel
from shiftadd_cli.blockwise.trace import Trace, trace_model
from shiftadd_cli.calibration.gradients import squared_gradients
from shiftadd_cli.calibration.hessian import Moments, gather_moments
from shiftadd_cli.calibration.mixtures import Group, enough_tokens, in_room, in_turns
from shiftadd_cli.distributed.team import ALONE, Team
from shiftadd_cli.source import LinearSpec

SensitivityKind = Literal["output", "divergence", "paper"]

# Number of tokens for which gradients are computed.
_GRADIENT_TOKENS = 16384

# Damping of the Hessian in the paper's code, relative to its mean diagonal.
_PAPER_DAMPING = 0.01


@dataclass(frozen=True)
class Sensitivities:
    """`costs`: predicted loss by linear and bits; `shared_inputs`: the linears that read one tensor, by full name;
    `tables`: predicted loss by table and form, where that is chosen too."""

    costs: dict[str, dict[Choice, float]]
    shared_inputs: tuple[tuple[str, ...], ...]
    tables: dict[str, dict[Choice, float]] = field(default_factory=dict)

    def covers(self, candidates: Iterable[Choice]) -> bool:
        """Whether every linear has a cost at each of these bits."""
        required = set(candidates)
        return all(required <= costs.keys() for costs in self.costs.values())


def gradient_stride(samples: int, tokens: int) -> int:
    """Stride over `samples` samples of `tokens` tokens each: gradients are computed for every stride-th sample."""
    return max(1, samples * tokens // _GRADIENT_TOKENS)


class Measure(Protocol):
    """Measures one value per bits for the linears that read one input, in the order of `specs`."""

    def __call__(
        self, specs: Sequence[LinearSpec], weights: Sequence[Tensor], hessian: Tensor | None
    ) -> list[dict[Choice, float]]: ...


def measure_sensitivities(
    kind: SensitivityKind,
    model: BlockwiseModel,
    samples: Tensor,
    trace: Trace,
    options: SolverOptions,
    candidates: Sequence[Choice],
    *,
    seed: int,
) -> Sensitivities:
    """Sensitivities of every linear of the model at each of `candidates`.

    samples: see `trace_model`; trace: of these samples; its hidden states are consumed. options: those of the run;
    their choice is ignored. Parts outside the blocks must be loaded. The processes of a team share the work, and all
    get the full result.

    Raises NumericalError naming a layer whose values or gradients are not finite.
    """
    if kind == "paper":
        paper = PaperCriterion(candidates)
        return walk_blocks(model, trace, paper)
    if kind == "divergence":
        replay = ProbeModel(model, probe_samples(samples), len(trace.hidden[0]))
        divergence = Divergence(replay, options, candidates)
        result = walk_blocks(model, trace, divergence)
        return replace(result, costs=divergence.costs(result.costs))
    probe = samples[:: gradient_stride(len(samples), trace.hidden[0].shape[1])]
    traced = trace_model(model, probe, trace.hidden.batch_size, passage=trace.passage)
    gradients = squared_gradients(model, probe, traced, seed=seed)
    estimate = OutputError(gradients.means, options, candidates, model.context.team)
    replay = ProbeModel(model, probe_samples(samples), len(trace.hidden[0]))
    # One number of planes is enough, since an estimate is off by the same factor at any number.
    divergence = Divergence(replay, options, [ANCHOR_PLANES])
    both = _WithAnchors(choose_anchors(model.structure.linears), divergence, estimate)
    result = walk_blocks(model, trace, both)
    costs, anchor_costs = estimate.costs(result.costs), estimate.costs(both.errors)
    return replace(result, costs=anchored(costs, anchor_costs, divergence.measured(), model.structure.linears))


class _WithAnchors:
    """Measures the named linears with one measure, stored in `errors`, and returns another measure of all linears."""

    def __init__(self, names: Collection[str], of_some: Measure, of_all: Measure) -> None:
        self._names, self._of_some, self._of_all = names, of_some, of_all
        self.errors: dict[str, dict[Choice, float]] = {}

    def __call__(
        self, specs: Sequence[LinearSpec], weights: Sequence[Tensor], hessian: Tensor | None
    ) -> list[dict[Choice, float]]:
        some = [(spec, weight) for spec, weight in zip(specs, weights, strict=True) if spec.name in self._names]
        if some:
            chosen, matrices = zip(*some, strict=True)
            measured = self._of_some(chosen, matrices, hessian)
            self.errors |= {spec.name: errors for spec, errors in zip(chosen, measured, strict=True)}
        return self._of_all(specs, weights, hessian)


class OutputError:
    """Relative errors ‖(W − Ŵ) x‖² / ‖W x‖², and their factor in the loss: ½ E[g²] · tr[W H Wᵀ], in nats per token."""

    def __init__(
        self, squares: Mapping[str, float], options: SolverOptions, candidates: Sequence[Choice], team: Team = ALONE
    ) -> None:
        """squares: mean squared gradient of the end loss at each linear's output, over tokens and features."""
        self._squares = squares
        self._solve = CandidateSolver(options, candidates, team)
        self._all_rows = options.format.group_rows != 1
        self._signals: dict[str, float] = {}

    def __call__(
        self, specs: Sequence[LinearSpec], weights: Sequence[Tensor], hessian: Tensor | None
    ) -> list[dict[Choice, float]]:
        names = [spec.name for spec in specs]
        # Rows that share scales are not quantized independently.
        samples = [RowSample.of(weight, hessian, whole=self._all_rows) for weight in weights]
        if hessian is not None:
            for name, sample in zip(names, samples, strict=True):
                self._signals[name] = 0.5 * self._squares[name] * sample.signal
        errors: list[dict[Choice, float]] = [{} for _ in specs]
        for bits, solutions in self._solve(names, [sample.rows for sample in samples], hessian):
            for error, sample, solution in zip(errors, samples, solutions, strict=True):
                error[bits] = sample.relative_error(solution)
        return errors

    def costs(self, errors: Mapping[str, dict[Choice, float]]) -> dict[str, dict[Choice, float]]:
        """Predicted loss, in nats per token, from the relative errors of all linears.

        A linear that no calibration input or no gradient reached (in an expert that got no token) gets the median
        factor of the others: the model may depend on it even though nothing was measured.
        """
        reached = {name: signal for name, signal in self._signals.items() if signal > 0}
        usual = statistics.median(reached.values()) if reached else 1.0
        return {
            name: {bits: reached.get(name, usual) * error for bits, error in by_bits.items()}
            for name, by_bits in errors.items()
        }


class PaperCriterion:
    """C · 4^−bits; see the module. Only for numbers of planes; it is not defined for other primitives."""

    def __init__(self, candidates: Sequence[Choice]) -> None:
        self._planes = [bits for bits in candidates if isinstance(bits, int)]

    def __call__(
        self, specs: Sequence[LinearSpec], weights: Sequence[Tensor], hessian: Tensor | None
    ) -> list[dict[Choice, float]]:
        scores = [paper_score(weight, hessian, spec.name) for spec, weight in zip(specs, weights, strict=True)]
        return [{bits: score * 4.0**-bits for bits in self._planes} for score in scores]


def paper_score(weight: Tensor, hessian: Tensor | None, name: str) -> float:
    """‖S‖_F · std(S)² of a `[out, in]` weight; without a Hessian the identity is used."""
    columns = weight.shape[1]
    form = torch.eye(columns, device=weight.device) if hessian is None else hessian
    objective = build_objective(form, _PAPER_DAMPING, name, order="hessian", group_columns=1, whole_groups=False)
    scaled = (weight.float()[:, objective.order] / objective.inverse_factor.diagonal()).double()
    return float(scaled.norm() * scaled.std() ** 2)


def walk_blocks(model: BlockwiseModel, trace: Trace, measure: Measure) -> Sensitivities:
    """Run the calibration inputs through the original blocks, and measure the linears of each block on their inputs."""
    costs: dict[str, dict[Choice, float]] = {}
    shared: list[tuple[str, ...]] = []
    structure = model.structure
    for depth, name, block in model.blocks("Measuring"):
        calls = trace.calls_of(depth)
        stream = BlockStream(name, block, trace.hidden, calls, model.context)
        specs = {spec.kind: spec for spec in structure.linears if spec.block == depth}
        turns = in_turns(stream.shared_inputs(list(specs)), list(specs.values()))
        groups = [group for turn in turns for group in turn]
        unreached: list[Group] = [(kind,) for kind in specs if not any(kind in group for group in groups)]
        for part in [*in_room(groups, list(specs.values()), cross=False), unreached]:
            part_moments: Sequence[Moments | None] = [None] * len(unreached)
            if part is not unreached:
                part_moments = gather_moments(stream, part)
            for group, moments in zip(part, part_moments, strict=True):
                members = [specs[kind] for kind in group]
                weights = [spec.matrix(block).float() for spec in members]
                measured = measure(members, weights, None if moments is None else _form(members[0], moments))
                costs |= {spec.name: cost for spec, cost in zip(members, measured, strict=True)}
        shared += [tuple(specs[kind].name for kind in group) for group in groups]
        if depth + 1 < len(structure.blocks):
            stream.advance()
    return Sensitivities({spec.name: costs[spec.name] for spec in structure.linears}, tuple(shared))


def _form(spec: LinearSpec, moments: Moments) -> Tensor | None:
    """The second moment used to measure the errors of a linear. For an expert with too few tokens it is their mean
    power in every direction, since such an expert is fitted on weights alone; None if it had no tokens."""
    if not moments.tokens:
        return None
    if enough_tokens(spec, moments.tokens):
        return moments.hessian
    diagonal = moments.hessian.diagonal()
    return torch.diag(diagonal.mean().expand_as(diagonal))
