"""Predicted losses against their definitions, computed with the whole model in memory, and against real divergences."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from formats import solver_options
from tiny_models import save_tiny
from torch import Tensor

from shiftadd_cli.allocation import candidates, row_sample, sensitivity
from shiftadd_cli.allocation.anchors import choose_anchors
from shiftadd_cli.allocation.sensitivity import (
    OutputError,
    Sensitivities,
    SensitivityKind,
    measure_sensitivities,
    paper_score,
    walk_blocks,
)
from shiftadd_cli.bcq.choices import Choice
from shiftadd_cli.bcq.options import SolverOptions
from shiftadd_cli.bcq.solver import Solution, quantize_matrices
from shiftadd_cli.blockwise.model import BlockwiseModel
from shiftadd_cli.blockwise.trace import trace_model
from shiftadd_cli.calibration.gradients import squared_gradients
from shiftadd_cli.context import Context
from shiftadd_cli.source import LinearSpec, find_structure, open_source
from shiftadd_cli.source.experts import split_experts

WINDOWS = torch.randint(0, 256, (8, 24), generator=torch.Generator().manual_seed(1))
OPTIONS = solver_options(group_size=16, fit_rounds=2)


def measure(
    path: Path, kind: SensitivityKind, candidates: Sequence[Choice] = (2, 4), options: SolverOptions = OPTIONS
) -> Sensitivities:
    source = open_source(str(path))
    structure = find_structure(source.skeleton())
    source.materialise(structure.outside)
    trace = trace_model(BlockwiseModel(source, structure), WINDOWS, 4)
    return measure_sensitivities(
        kind,
        BlockwiseModel(source, structure),
        WINDOWS,
        trace,
        options,
        candidates,
        seed=0,
    )


def matrices(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight `[out, in]` and second moment of the inputs of every linear, from the whole model at once."""
    source = open_source(str(path))
    model = source.load_model(torch.float32)
    split_experts(model)
    inputs: dict[str, Tensor] = {}
    specs = find_structure(source.skeleton()).linears
    for spec in specs:
        model.get_submodule(spec.name).register_forward_pre_hook(
            lambda _, args, name=spec.name: inputs.update({name: args[0].reshape(-1, args[0].shape[-1])})
        )
    with torch.no_grad():
        model(input_ids=WINDOWS, use_cache=False)
    result: dict[str, tuple[Tensor, Tensor]] = {}
    for spec in specs:
        linear: Any = model.get_submodule(spec.name)
        weight = linear.weight.data
        rows = inputs[spec.name].double()
        result[spec.name] = (weight.T if spec.transposed else weight).double(), rows.T @ rows / len(rows)
    return result


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral"])
def test_output_costs_are_half_the_squared_gradient_times_the_squared_error(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two differ by one factor per kind of linear, which is checked below."""
    save_tiny(family, tmp_path)
    solved: dict[tuple[str, Choice], Solution] = {}

    def spy(
        weights: Sequence[Tensor], names: Sequence[str], hessian: Tensor | None, options: SolverOptions, **others: Any
    ) -> list[Solution]:
        assert options.refine_rounds == 0
        solutions = quantize_matrices(weights, names, hessian, options, **others)
        for name, solution in zip(names, solutions, strict=True):
            solved[name, options.format.bits] = solution
        return solutions

    monkeypatch.setattr(candidates, "quantize_matrices", spy)
    costs = measure(tmp_path, "output").costs
    source = open_source(str(tmp_path))
    structure = find_structure(source.skeleton())
    source.materialise(structure.outside)
    trace = trace_model(BlockwiseModel(source, structure), WINDOWS, 4)
    squares = squared_gradients(BlockwiseModel(source, structure), WINDOWS, trace, seed=0).means
    kinds = {spec.name: re.sub(r"\d+", "*", spec.kind) for spec in structure.linears}
    factors: dict[str, list[float]] = {}
    for name, (weight, hessian) in matrices(tmp_path).items():
        assert list(costs[name]) == [2, 4]
        for bits, cost in costs[name].items():
            error = weight - solved[name, bits].weight.decode().double()
            expected = 0.5 * squares[name] * float(((error @ hessian) * error).sum())
            factors.setdefault(kinds[name], []).append(cost / expected)
    for kind_factors in factors.values():
        assert kind_factors == pytest.approx([kind_factors[0]] * len(kind_factors), rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_output_costs_of_anchors_add_up_to_their_divergences(tmp_path: Path, family: str) -> None:
    save_tiny(family, tmp_path)
    structure = find_structure(open_source(str(tmp_path)).skeleton())
    estimated, measured = measure(tmp_path, "output").costs, measure(tmp_path, "divergence", (2,)).costs
    sums: dict[str, list[float]] = {}
    for spec in structure.linears:
        if spec.name in choose_anchors(structure.linears):
            totals = sums.setdefault(re.sub(r"\d+", "*", spec.kind), [0.0, 0.0])
            totals[0] += estimated[spec.name][2]
            totals[1] += measured[spec.name][2]
    assert len(sums) >= 4
    for estimate, divergence in sums.values():
        assert estimate == pytest.approx(divergence, rel=1e-3)


def test_predicted_losses_are_close_to_real_divergences(tmp_path: Path) -> None:
    """Each layer is replaced alone, as in the definition of the prediction. Sizes and order both agree."""
    save_tiny("llama", tmp_path)
    costs = measure(tmp_path, "output", (2, 3)).costs
    original = open_source(str(tmp_path)).load_model(torch.float32)
    with torch.no_grad():
        reference = original(input_ids=WINDOWS).logits.log_softmax(-1)
    predicted, real = [], []
    for name, (weight, hessian) in matrices(tmp_path).items():
        for bits, cost in costs[name].items():
            options = solver_options(bits=bits, group_size=16, fit_rounds=2, refine_rounds=0)
            (solution,) = quantize_matrices([weight], [name], hessian.float(), options)
            model = copy.deepcopy(original)
            model.get_submodule(name).weight.data = solution.weight.decode()
            with torch.no_grad():
                logits = model(input_ids=WINDOWS).logits.log_softmax(-1)
            predicted.append(cost)
            real.append(float((reference.exp() * (reference - logits)).sum(-1).mean()))
    ratios = torch.tensor(predicted) / torch.tensor(real)
    assert 0.5 < float(ratios.median()) < 2
    pairs = [(i, j) for i in range(len(real)) for j in range(i)]
    concordant = sum((predicted[i] - predicted[j]) * (real[i] - real[j]) > 0 for i, j in pairs)
    assert 2 * concordant / len(pairs) - 1 > 0.7


def test_samples_of_rows_and_windows_give_similar_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama", tmp_path)
    full = measure(tmp_path, "output").costs
    solved_rows: dict[str, list[int]] = {}

    def spy(weights: Sequence[Tensor], names: Sequence[str], *rest: Any, **others: Any) -> list[Solution]:
        for name, weight in zip(names, weights, strict=True):
            solved_rows.setdefault(name, []).append(len(weight))
        return quantize_matrices(weights, names, *rest, **others)

    monkeypatch.setattr(candidates, "quantize_matrices", spy)
    monkeypatch.setattr(row_sample, "_LARGEST_ROWS", 4)
    monkeypatch.setattr(row_sample, "_OTHER_ROWS", 20)
    monkeypatch.setattr(sensitivity, "_GRADIENT_TOKENS", WINDOWS.numel() // 2)
    sampled = measure(tmp_path, "output").costs
    # Anchors are solved once more, as whole matrices, to measure their divergence.
    anchors = choose_anchors(find_structure(open_source(str(tmp_path)).skeleton()).linears)
    assert {name: len(rows) for name, rows in solved_rows.items()} == {
        name: 2 + (name in anchors) for name in solved_rows
    }
    assert max(max(sorted(rows)[:2]) for rows in solved_rows.values()) == 24
    ratios = torch.tensor([sampled[name][bits] / full[name][bits] for name in full for bits in (2, 4)])
    assert float(ratios.log().abs().max()) < 0.7
    assert 0.8 < float(ratios.median()) < 1.25
    assert not torch.equal(ratios, torch.ones_like(ratios))


def test_rows_that_share_scales_are_not_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama", tmp_path)
    options = solver_options(group_size=1, group_rows=8, refine_rounds=0, row_scale=False)
    full = measure(tmp_path, "output", options=options).costs
    monkeypatch.setattr(row_sample, "_OTHER_ROWS", 8)
    monkeypatch.setattr(row_sample, "_LARGEST_ROWS", 4)
    assert measure(tmp_path, "output", options=options).costs == full


def test_more_bits_cost_less(tmp_path: Path) -> None:
    save_tiny("opt", tmp_path)
    for kind in ("output", "paper"):
        for costs in measure(tmp_path, kind, (2, 3, 4)).costs.values():
            assert costs[2] > costs[3] > costs[4] > 0


def test_blocks_are_released_and_shared_inputs_are_returned(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    source = open_source(str(tmp_path))
    structure = find_structure(source.skeleton())
    source.materialise(structure.outside)
    loaded: list[int] = []
    walks: list[tuple[str, list[str]]] = []

    def watch(names: Sequence[str], text: str) -> Iterator[str]:
        walks.append((text, list(names)))
        for name in names:
            blocks = [source.skeleton().get_submodule(block) for block in structure.blocks]
            loaded.append(sum(not parameter.is_meta for block in blocks for parameter in block.parameters()))
            yield name

    model = BlockwiseModel(source, structure, Context(torch.device("cpu"), progress=watch))
    trace = trace_model(model, WINDOWS, 4)
    sensitivities = measure_sensitivities("output", model, WINDOWS, trace, OPTIONS, (2,), seed=0)
    blocks, batches = list(structure.blocks), [f"batch {first}" for first in range(0, len(WINDOWS), 4)]
    tracing = [("Tracing", blocks), ("Checking", blocks)]
    gradients = [("Predictions", blocks), ("Head gradients", batches), ("Gradients", blocks[::-1])]
    measuring = [("Measuring", blocks), ("Comparing", ["part 0"])]
    assert walks == [*tracing, *gradients, *tracing, *measuring]
    assert not any(loaded), "a block is loaded only after it is announced"
    first = [tuple(name.removeprefix("model.layers.0.") for name in names) for names in sensitivities.shared_inputs[:4]]
    assert first == [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ]
    assert list(sensitivities.costs) == [spec.name for spec in structure.linears]
    assert sensitivities.covers([2])
    assert not sensitivities.covers([2, 3])


def test_unreached_layers_get_the_median_of_the_others(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    specs = find_structure(open_source(str(tmp_path)).skeleton()).linears[:4]
    weights = [torch.randn(spec.out_features, spec.in_features) for spec in specs]
    squares = {spec.name: square for spec, square in zip(specs, (1.0, 3.0, 0.0, 9.0), strict=True)}
    output_error = OutputError(squares, OPTIONS, (2,))
    errors: dict[str, dict[Choice, float]] = {}
    for spec, weight in zip(specs[:3], weights[:3], strict=True):
        (errors[spec.name],) = output_error([spec], [weight], torch.eye(spec.in_features))
    (errors[specs[3].name],) = output_error([specs[3]], [weights[3]], None)
    costs = output_error.costs(errors)
    signals = [costs[spec.name][2] / errors[spec.name][2] for spec in specs]
    powers = [float(weight.square().sum()) for weight in weights]
    assert signals[:2] == pytest.approx([0.5 * powers[0], 1.5 * powers[1]], rel=1e-4)
    median = (signals[0] + signals[1]) / 2
    assert signals[2:] == pytest.approx([median, median])


def test_the_paper_score_follows_its_formula() -> None:
    """The formula is written out with an inverse and its upper factor, in float64."""
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(10, 12, generator=generator), torch.randn(50, 12, generator=generator)
    inputs[:, 3] *= 6
    hessian = inputs.T @ inputs / 50
    order = hessian.diagonal().argsort(descending=True)
    damped = hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(12)
    d = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True).diagonal()
    s = weight.double()[:, order] / d
    expected = float(s.square().sum().sqrt() * ((s - s.mean()) ** 2).sum() / (s.numel() - 1))
    assert paper_score(weight, hessian, "layer") == pytest.approx(expected, rel=1e-4)


def test_paper_costs_rank_layers_as_the_score_does_at_any_bits(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    costs = measure(tmp_path, "paper", (2, 3)).costs
    for name, (weight, hessian) in matrices(tmp_path).items():
        score = paper_score(weight.float(), hessian.float(), name)
        assert costs[name][2] == pytest.approx(score / 16, rel=0.02)
        assert costs[name][3] == pytest.approx(costs[name][2] / 4)


def test_an_expert_with_too_few_tokens_is_measured_by_their_mean_power(tmp_path: Path) -> None:
    """It is fitted by its weights alone, and the mean power keeps its errors on the scale of its few tokens."""
    save_tiny("olmoe", tmp_path)
    windows = WINDOWS[:, :10]
    source = open_source(str(tmp_path))
    structure = find_structure(source.skeleton())
    source.materialise(structure.outside)
    forms: dict[str, Tensor | None] = {}

    def note(
        specs: Sequence[LinearSpec], weights: Sequence[Tensor], hessian: Tensor | None
    ) -> list[dict[Choice, float]]:
        forms.update({spec.name: hessian for spec in specs})
        return [{2: 1.0} for _ in specs]

    trace = trace_model(BlockwiseModel(source, structure), windows, 4)
    walk_blocks(BlockwiseModel(source, structure), trace, note)
    source = open_source(str(tmp_path))
    source.materialise([""])
    inputs: dict[str, Tensor] = {}
    for spec in structure.linears:
        source.skeleton().get_submodule(spec.name).register_forward_pre_hook(
            lambda _, args, name=spec.name: inputs.update({name: args[0].reshape(-1, args[0].shape[-1])})
        )
    with torch.no_grad():
        source.skeleton()(input_ids=windows, use_cache=False)
    starved = [spec for spec in structure.linears if spec.experts and len(inputs[spec.name]) < spec.in_features]
    assert 0 < len(starved) < sum(spec.experts is not None for spec in structure.linears)
    for spec in structure.linears:
        moment = inputs[spec.name].T @ inputs[spec.name] / len(inputs[spec.name])
        if spec in starved:
            moment = torch.eye(spec.in_features) * moment.diagonal().mean()
        torch.testing.assert_close(forms[spec.name], moment, rtol=1e-3, atol=1e-4)
