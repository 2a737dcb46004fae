"""Measured divergences against the slow way: the whole model, one linear replaced, everything in float64."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from formats import solver_options
from tiny_models import save_tiny

from shiftadd_cli.allocation import candidates
from shiftadd_cli.allocation.divergence import PROBE_WINDOWS, Divergence, probe_samples
from shiftadd_cli.allocation.sensitivity import measure_sensitivities, walk_blocks
from shiftadd_cli.bcq.solver import quantize_matrices
from shiftadd_cli.blockwise.model import BlockwiseModel
from shiftadd_cli.blockwise.probe_model import ProbeModel
from shiftadd_cli.blockwise.trace import trace_model
from shiftadd_cli.context import Context
from shiftadd_cli.errors import NumericalError
from shiftadd_cli.source import Source, find_structure, open_source
from shiftadd_cli.source.experts import split_experts

CPU = torch.device("cpu")
WINDOWS = torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(1))
OPTIONS = solver_options(group_size=16, fit_rounds=2, refine_rounds=3, asymmetric=0.5)


def opened(path, skip=()):
    source = open_source(str(path))
    structure = find_structure(source.skeleton(), skip)
    source.materialise(structure.outside)
    return source, structure, trace_model(BlockwiseModel(source, structure), WINDOWS, 4)


def measure(path, bits=(2, 4), kind="divergence"):
    source, structure, trace = opened(path)
    return measure_sensitivities(
        kind,
        BlockwiseModel(source, structure),
        WINDOWS,
        trace,
        OPTIONS,
        bits,
        seed=0,
    )


def in_passes(path, memory_bytes, skip=(), bits=(2, 3)):
    """Divergences with so much memory for variants, and the measure that held them."""
    source, structure, trace = opened(path, skip)
    held = []

    def progress(names, text):
        if text in ("Replaying", "Comparing"):
            held.append((text, len(measure._held)))
        return names

    context = Context(torch.device("cpu"), progress=progress)
    replay = ProbeModel(BlockwiseModel(source, structure, context), probe_samples(WINDOWS), 4)
    measure = Divergence(replay, OPTIONS, bits, memory_bytes=memory_bytes)
    found = walk_blocks(BlockwiseModel(source, structure), trace, measure)
    return measure.costs(found.costs), held, replay.hidden.nbytes


@pytest.fixture
def solved(monkeypatch):
    """What the solver made of every linear, by name and bits."""
    found = {}

    def spy(weights, names, hessian, options, **others):
        assert options.refine_rounds == 0
        assert options.asymmetric == 0
        solutions = quantize_matrices(weights, names, hessian, options, **others)
        found.update({(name, options.format.bits): each for name, each in zip(names, solutions, strict=True)})
        return solutions

    monkeypatch.setattr(candidates, "quantize_matrices", spy)
    return found


def the_slow_way(path, solved):
    """By name and bits, with transformers' own model, on the windows that are probed."""
    source = open_source(str(path))
    model = source.load_model(torch.float32).double()
    split_experts(model)
    windows = probe_samples(WINDOWS)
    specs = {spec.name: spec for spec in find_structure(source.skeleton()).linears}

    def chances():
        with torch.no_grad():
            return model(input_ids=windows, use_cache=False).logits.log_softmax(-1)

    reference, found = chances(), {}
    assert reference.dtype == torch.float64
    for (name, bits), solution in solved.items():
        weight = model.get_submodule(name).weight
        kept, decoded = weight.data, solution.weight.decode().double()
        weight.data = decoded.T if specs[name].transposed else decoded
        found[name, bits] = float((reference.exp() * (reference - chances())).sum(-1).mean())
        weight.data = kept
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "opt", "bloom", "mixtral", "gpt_oss"])
def test_costs_are_the_divergences_of_the_whole_model_with_one_linear_replaced(tmp_path, family, solved):
    save_tiny(family, tmp_path)
    found = measure(tmp_path)
    expected = the_slow_way(tmp_path, solved)
    assert {(name, bits) for name, each in found.costs.items() for bits in each} == expected.keys()
    for (name, bits), divergence in expected.items():
        assert found.costs[name][bits] == pytest.approx(divergence, rel=2e-3, abs=2e-7)
        assert found.costs[name][bits] >= 0


def test_a_model_of_16_bits_is_measured_without_their_noise(tmp_path, solved):
    """In bfloat16 the last bits of everything would drown what four bits of one linear cost."""
    save_tiny("llama", tmp_path, dtype=torch.bfloat16)
    assert open_source(str(tmp_path)).dtype == torch.bfloat16
    found = measure(tmp_path, bits=(6,))
    for (name, bits), divergence in the_slow_way(tmp_path, solved).items():
        assert found.costs[name][bits] == pytest.approx(divergence, rel=2e-3, abs=2e-7)


@pytest.mark.parametrize("room", [0, 1, 5])
def test_what_does_not_fit_goes_in_groups_and_comes_out_the_same(tmp_path, room):
    save_tiny("qwen3", tmp_path)
    whole, held, each = in_passes(tmp_path, 1 << 30)
    assert held == [("Comparing", 0)]
    parts, held, _ = in_passes(tmp_path, room * each)
    assert parts == whole
    # Three blocks of seven linears at two numbers of bits.
    assert max(count for _, count in held) == max(room, 1)
    assert sum(text == "Comparing" for text, _ in held) == -(-42 // max(room, 1))


def test_no_block_is_read_more_often_than_there_are_groups(tmp_path, monkeypatch):
    save_tiny("qwen3", tmp_path)
    *_, each = in_passes(tmp_path, 1 << 30)
    real, read = Source.materialise, Counter()

    def spy(source, prefixes):
        on_meta = source.skeleton().get_submodule("model.layers.2").self_attn.q_proj.weight.is_meta
        read.update(["model.layers.2"] if on_meta and "model.layers.2" in prefixes else [])
        real(source, prefixes)

    monkeypatch.setattr(Source, "materialise", spy)
    in_passes(tmp_path, 1 << 30)
    # Traced, checked and walked through, by the original and by its float32 copy.
    once = read["model.layers.2"]
    assert once == 6
    read.clear()
    in_passes(tmp_path, 20 * each)
    # A group ends inside the second block and one inside the third, which is loaded then.
    assert read["model.layers.2"] == once + 1


@pytest.mark.parametrize("skip", ["model.layers.0", "model.layers.1", "model.layers.2"])
def test_blocks_without_linears_are_passed_through(tmp_path, skip):
    save_tiny("qwen3", tmp_path)
    whole, *_ = in_passes(tmp_path, 1 << 30)
    rest, *_ = in_passes(tmp_path, 1 << 30, (skip,))
    assert rest == {name: each for name, each in whole.items() if not name.startswith(skip)}


def test_the_original_is_left_as_it_was(tmp_path):
    """The blocks in front of the one that is measured are the original's for every variant: the same number twice."""
    save_tiny("llama", tmp_path)
    first = measure(tmp_path, (3,)).costs
    both = measure(tmp_path, (2, 3)).costs
    assert {name: {3: each[3]} for name, each in both.items()} == first


def test_what_no_token_reached_counts_as_the_median_of_the_others(tmp_path):
    save_tiny("llama", tmp_path)
    source, structure, trace = opened(tmp_path)
    replay = ProbeModel(BlockwiseModel(source, structure), probe_samples(WINDOWS), 4)
    measure = Divergence(replay, OPTIONS, (2, 3))
    found = walk_blocks(BlockwiseModel(source, structure), trace, measure)
    costs = measure.costs({**found.costs, "expert": {2: 0.5, 3: 0.125}})
    for bits, error in ((2, 0.5), (3, 0.125)):
        ratios = torch.tensor([costs[name][bits] / each[bits] for name, each in found.costs.items()])
        assert costs["expert"][bits] == pytest.approx(error * float(ratios.quantile(0.5)), rel=1e-4)


def test_a_linear_that_breaks_the_model_is_named(tmp_path, monkeypatch):
    save_tiny("llama", tmp_path)
    monkeypatch.setattr(ProbeModel, "divergences", lambda _, __, others: [float("nan")] * len(others))
    with pytest.raises(NumericalError, match=r"model.layers.0.self_attn.q_proj has 2 bits.*`skip`"):
        measure(tmp_path, (2,))


def test_windows_that_are_probed_are_few_and_lie_evenly():
    windows = torch.arange(100).view(50, 2)
    assert probe_samples(windows)[:, 0].tolist() == [0, 32, 66, 98]
    assert len(probe_samples(windows)) == PROBE_WINDOWS
    assert torch.equal(probe_samples(windows[:3]), windows[:3])
    assert torch.equal(probe_samples(windows[:1]), windows[:1])
