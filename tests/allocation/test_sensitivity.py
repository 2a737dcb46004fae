"""Predicted losses against their definitions, computed with the whole model in memory, and against real divergences."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from formats import solver_options
from tiny_models import save_tiny

from shiftadd_cli.allocation import candidates, row_sample, sensitivity
from shiftadd_cli.allocation.anchors import choose_anchors
from shiftadd_cli.allocation.sensitivity import OutputError, measure_sensitivities, paper_score, walk_blocks
from shiftadd_cli.bcq.solver import quantize_matrices
from shiftadd_cli.blockwise.model import BlockwiseModel
from shiftadd_cli.blockwise.trace import trace_model
from shiftadd_cli.calibration.gradients import squared_gradients
from shiftadd_cli.context import Context
from shiftadd_cli.source import find_structure, open_source
from shiftadd_cli.source.experts import split_experts

CPU = torch.device("cpu")
WINDOWS = torch.randint(0, 256, (8, 24), generator=torch.Generator().manual_seed(1))
OPTIONS = solver_options(group_size=16, fit_rounds=2)


def measure(path, kind, candidates=(2, 4), options=OPTIONS):
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


def matrices(path):
    """Weight `[out, in]` and second moment of the inputs of every linear, from the whole model at once."""
    source = open_source(str(path))
    model = source.load_model(torch.float32)
    split_experts(model)
    seen = {}
    specs = find_structure(source.skeleton()).linears
    for spec in specs:
        model.get_submodule(spec.name).register_forward_pre_hook(
            lambda _, args, name=spec.name: seen.update({name: args[0].reshape(-1, args[0].shape[-1])})
        )
    with torch.no_grad():
        model(input_ids=WINDOWS, use_cache=False)
    found = {}
    for spec in specs:
        weight = model.get_submodule(spec.name).weight.data
        rows = seen[spec.name].double()
        found[spec.name] = (weight.T if spec.transposed else weight).double(), rows.T @ rows / len(rows)
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral"])
def test_output_costs_are_half_the_squared_gradient_times_the_squared_error(tmp_path, family, monkeypatch):
    """But for one factor for all linears of a kind, which is checked below."""
    save_tiny(family, tmp_path)
    solved = {}

    def spy(weights, names, hessian, options, **others):
        assert options.refine_rounds == 0
        solutions = quantize_matrices(weights, names, hessian, options, **others)
        solved.update({(name, options.format.bits): each for name, each in zip(names, solutions, strict=True)})
        return solutions

    monkeypatch.setattr(candidates, "quantize_matrices", spy)
    found = measure(tmp_path, "output")
    source = open_source(str(tmp_path))
    structure = find_structure(source.skeleton())
    source.materialise(structure.outside)
    trace = trace_model(BlockwiseModel(source, structure), WINDOWS, 4)
    squares = squared_gradients(BlockwiseModel(source, structure), WINDOWS, trace, seed=0).means
    kinds = {spec.name: re.sub(r"\d+", "*", spec.kind) for spec in structure.linears}
    factors: dict[str, list[float]] = {}
    for name, (weight, hessian) in matrices(tmp_path).items():
        assert list(found.costs[name]) == [2, 4]
        for bits, cost in found.costs[name].items():
            error = weight - solved[name, bits].weight.decode().double()
            expected = 0.5 * squares[name] * float(((error @ hessian) * error).sum())
            factors.setdefault(kinds[name], []).append(cost / expected)
    for each in factors.values():
        assert each == pytest.approx([each[0]] * len(each), rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_output_costs_of_some_linears_of_each_kind_add_up_to_their_divergences(tmp_path, family):
    save_tiny(family, tmp_path)
    structure = find_structure(open_source(str(tmp_path)).skeleton())
    estimated, measured = measure(tmp_path, "output").costs, measure(tmp_path, "divergence", (2,)).costs
    sums: dict[str, list[float]] = {}
    for spec in structure.linears:
        if spec.name in choose_anchors(structure.linears):
            both = sums.setdefault(re.sub(r"\d+", "*", spec.kind), [0.0, 0.0])
            both[0] += estimated[spec.name][2]
            both[1] += measured[spec.name][2]
    assert len(sums) >= 4
    for estimate, divergence in sums.values():
        assert estimate == pytest.approx(divergence, rel=1e-3)


def test_the_predicted_loss_is_of_the_size_of_the_real_divergence(tmp_path):
    """Of each layer replaced alone, and in the right order: the definition of what is predicted."""
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


def test_samples_of_rows_and_of_windows_predict_what_all_of_them_do(tmp_path, monkeypatch):
    save_tiny("llama", tmp_path)
    whole = measure(tmp_path, "output").costs
    solved: dict[str, list[int]] = {}

    def spy(weights, names, *rest, **others):
        for name, weight in zip(names, weights, strict=True):
            solved.setdefault(name, []).append(len(weight))
        return quantize_matrices(weights, names, *rest, **others)

    monkeypatch.setattr(candidates, "quantize_matrices", spy)
    monkeypatch.setattr(row_sample, "_LARGEST_ROWS", 4)
    monkeypatch.setattr(row_sample, "_OTHER_ROWS", 20)
    monkeypatch.setattr(sensitivity, "_GRADIENT_TOKENS", WINDOWS.numel() // 2)
    sampled = measure(tmp_path, "output").costs
    # Whole matrices are solved where the divergence is measured as well, once.
    anchors = choose_anchors(find_structure(open_source(str(tmp_path)).skeleton()).linears)
    assert {name: len(each) for name, each in solved.items()} == {name: 2 + (name in anchors) for name in solved}
    assert max(max(sorted(each)[:2]) for each in solved.values()) == 24
    ratios = torch.tensor([sampled[name][bits] / whole[name][bits] for name in whole for bits in (2, 4)])
    assert float(ratios.log().abs().max()) < 0.7
    assert 0.8 < float(ratios.median()) < 1.25
    assert not torch.equal(ratios, torch.ones_like(ratios))


def test_rows_that_share_scales_are_not_sampled(tmp_path, monkeypatch):
    save_tiny("llama", tmp_path)
    options = solver_options(group_size=1, group_rows=8, refine_rounds=0, row_scale=False)
    whole = measure(tmp_path, "output", options=options).costs
    monkeypatch.setattr(row_sample, "_OTHER_ROWS", 8)
    monkeypatch.setattr(row_sample, "_LARGEST_ROWS", 4)
    assert measure(tmp_path, "output", options=options).costs == whole


def test_more_bits_cost_less(tmp_path):
    save_tiny("opt", tmp_path)
    for kind in ("output", "paper"):
        for costs in measure(tmp_path, kind, (2, 3, 4)).costs.values():
            assert costs[2] > costs[3] > costs[4] > 0


def test_blocks_are_released_and_shared_inputs_are_told(tmp_path):
    save_tiny("llama", tmp_path)
    source = open_source(str(tmp_path))
    structure = find_structure(source.skeleton())
    source.materialise(structure.outside)
    trace = trace_model(BlockwiseModel(source, structure), WINDOWS, 4)
    held, walks = [], []

    def watch(names, text):
        walks.append((text, list(names)))
        for name in names:
            blocks = [source.skeleton().get_submodule(each) for each in structure.blocks]
            held.append(sum(not each.is_meta for block in blocks for each in block.parameters()))
            yield name

    model = BlockwiseModel(source, structure, Context(torch.device("cpu"), progress=watch))
    found = measure_sensitivities("output", model, WINDOWS, trace, OPTIONS, (2,), seed=0)
    blocks, batches = list(structure.blocks), [f"batch {first}" for first in range(0, len(WINDOWS), 4)]
    tracing = [("Tracing", blocks), ("Checking", blocks)]
    gradients = [("Predictions", blocks), ("Head gradients", batches), ("Gradients", blocks[::-1])]
    assert walks == [*tracing, *gradients, *tracing, ("Measuring", blocks), ("Comparing", ["part 0"])]
    assert not any(held), "a block that is shown as next is not loaded yet"
    first = [tuple(name.removeprefix("model.layers.0.") for name in names) for names in found.shared_inputs[:4]]
    assert first == [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ]
    assert list(found.costs) == [spec.name for spec in structure.linears]
    assert found.covers([2])
    assert not found.covers([2, 3])


def test_layers_that_nothing_reached_count_as_the_median_of_the_others(tmp_path):
    save_tiny("llama", tmp_path)
    specs = find_structure(open_source(str(tmp_path)).skeleton()).linears[:4]
    weights = [torch.randn(spec.out_features, spec.in_features) for spec in specs]
    squares = {spec.name: square for spec, square in zip(specs, (1.0, 3.0, 0.0, 9.0), strict=True)}
    measured = OutputError(squares, OPTIONS, (2,))
    errors = {}
    for spec, weight in zip(specs[:3], weights[:3], strict=True):
        (errors[spec.name],) = measured([spec], [weight], torch.eye(spec.in_features))
    (errors[specs[3].name],) = measured([specs[3]], [weights[3]], None)
    costs = measured.costs(errors)
    signals = [costs[spec.name][2] / errors[spec.name][2] for spec in specs]
    powers = [float(weight.square().sum()) for weight in weights]
    assert signals[:2] == pytest.approx([0.5 * powers[0], 1.5 * powers[1]], rel=1e-4)
    usual = (signals[0] + signals[1]) / 2
    assert signals[2:] == pytest.approx([usual, usual])


def test_the_score_of_the_paper_is_its_formula():
    """Written out with an inverse and its upper factor, in float64."""
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


def test_paper_costs_rank_layers_as_the_score_at_any_bits(tmp_path):
    save_tiny("llama", tmp_path)
    costs = measure(tmp_path, "paper", (2, 3)).costs
    for name, (weight, hessian) in matrices(tmp_path).items():
        score = paper_score(weight.float(), hessian.float(), name)
        assert costs[name][2] == pytest.approx(score / 16, rel=0.02)
        assert costs[name][3] == pytest.approx(costs[name][2] / 4)


def test_an_expert_that_read_too_few_tokens_is_measured_by_their_mean_power(tmp_path):
    """As it is fitted, by weights alone, and on the scale that few tokens matter on."""
    save_tiny("olmoe", tmp_path)
    windows = WINDOWS[:, :10]
    source = open_source(str(tmp_path))
    structure = find_structure(source.skeleton())
    source.materialise(structure.outside)
    forms = {}

    def note(specs, weights, hessian):
        forms.update({spec.name: hessian for spec in specs})
        return [{2: 1.0} for _ in specs]

    trace = trace_model(BlockwiseModel(source, structure), windows, 4)
    walk_blocks(BlockwiseModel(source, structure), trace, note)
    source = open_source(str(tmp_path))
    source.materialise([""])
    read = {}
    for spec in structure.linears:
        source.skeleton().get_submodule(spec.name).register_forward_pre_hook(
            lambda _, args, name=spec.name: read.update({name: args[0].reshape(-1, args[0].shape[-1])})
        )
    with torch.no_grad():
        source.skeleton()(input_ids=windows, use_cache=False)
    starved = [spec for spec in structure.linears if spec.experts and len(read[spec.name]) < spec.in_features]
    assert 0 < len(starved) < sum(spec.experts is not None for spec in structure.linears)
    for spec in structure.linears:
        moment = read[spec.name].T @ read[spec.name] / len(read[spec.name])
        if spec in starved:
            moment = torch.eye(spec.in_features) * moment.diagonal().mean()
        torch.testing.assert_close(forms[spec.name], moment, rtol=1e-3, atol=1e-4)
