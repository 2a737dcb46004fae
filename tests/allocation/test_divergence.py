"""Measured divergences against the slow way: the whole model, one linear replaced, everything in float64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from formats import solver_options
from tiny_models import save_tiny
from torch import Tensor

from shiftadd_cli.allocation import candidates
from shiftadd_cli.allocation.divergence import PROBE_WINDOWS, Divergence, probe_samples
from shiftadd_cli.allocation.sensitivity import Sensitivities, SensitivityKind, measure_sensitivities, walk_blocks
from shiftadd_cli.bcq.choices import Choice
from shiftadd_cli.bcq.options import SolverOptions
from shiftadd_cli.bcq.solver import Solution, quantize_matrices
from shiftadd_cli.blockwise.model import BlockwiseModel
from shiftadd_cli.blockwise.probe_model import ProbeModel
from shiftadd_cli.blockwise.trace import Trace, trace_model
from shiftadd_cli.context import Context
from shiftadd_cli.errors import NumericalError
from shiftadd_cli.source import Source, Structure, find_structure, open_source
from shiftadd_cli.source.experts import split_experts

WINDOWS = torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(1))
OPTIONS = solver_options(group_size=16, fit_rounds=2, refine_rounds=3, asymmetric=0.5)

# Solutions by name and bits.
Solutions = dict[tuple[str, Choice], Solution]


def opened(path: Path, skip: Sequence[str] = ()) -> tuple[Source, Structure, Trace]:
    source = open_source(str(path))
    structure = find_structure(source.skeleton(), skip)
    source.materialise(structure.outside)
    return source, structure, trace_model(BlockwiseModel(source, structure), WINDOWS, 4)


def measure(path: Path, bits: Sequence[Choice] = (2, 4), kind: SensitivityKind = "divergence") -> Sensitivities:
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


def in_passes(
    path: Path, memory_bytes: int, skip: Sequence[str] = (), bits: Sequence[Choice] = (2, 3)
) -> tuple[dict[str, dict[Choice, float]], list[tuple[str, int]], int]:
    """Divergences with this much memory for variants, the variants in memory at each step, and the bytes of one."""
    source, structure, trace = opened(path, skip)
    step_counts: list[tuple[str, int]] = []

    def progress(names: Sequence[str], text: str) -> Sequence[str]:
        if text in ("Replaying", "Comparing"):
            step_counts.append((text, len(divergence._held)))
        return names

    context = Context(torch.device("cpu"), progress=progress)
    replay = ProbeModel(BlockwiseModel(source, structure, context), probe_samples(WINDOWS), 4)
    divergence = Divergence(replay, OPTIONS, bits, memory_bytes=memory_bytes)
    errors = walk_blocks(BlockwiseModel(source, structure), trace, divergence)
    return divergence.costs(errors.costs), step_counts, replay.hidden.nbytes


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> Solutions:
    """Solutions by name and bits, which are added as the solver runs."""
    collected: Solutions = {}

    def spy(
        weights: Sequence[Tensor], names: Sequence[str], hessian: Tensor | None, options: SolverOptions, **others: Any
    ) -> list[Solution]:
        assert options.refine_rounds == 0
        assert options.asymmetric == 0
        solutions = quantize_matrices(weights, names, hessian, options, **others)
        for name, solution in zip(names, solutions, strict=True):
            collected[name, options.format.bits] = solution
        return solutions

    monkeypatch.setattr(candidates, "quantize_matrices", spy)
    return collected


def reference_divergences(path: Path, solved: Solutions) -> dict[tuple[str, Choice], float]:
    """Divergences by name and bits, from transformers' own model on the probe windows."""
    source = open_source(str(path))
    model = source.load_model(torch.float32).double()
    split_experts(model)
    windows = probe_samples(WINDOWS)
    specs = {spec.name: spec for spec in find_structure(source.skeleton()).linears}

    def log_probabilities() -> Tensor:
        with torch.no_grad():
            return model(input_ids=windows, use_cache=False).logits.log_softmax(-1)

    reference = log_probabilities()
    divergences: dict[tuple[str, Choice], float] = {}
    assert reference.dtype == torch.float64
    for (name, bits), solution in solved.items():
        weight = model.get_submodule(name).weight
        original, decoded = weight.data, solution.weight.decode().double()
        weight.data = decoded.T if specs[name].transposed else decoded
        divergences[name, bits] = float((reference.exp() * (reference - log_probabilities())).sum(-1).mean())
        weight.data = original
    return divergences


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "opt", "bloom", "mixtral", "gpt_oss"])
def test_costs_are_divergences_of_the_model_with_one_linear_replaced(
    tmp_path: Path, family: str, solved: Solutions
) -> None:
    save_tiny(family, tmp_path)
    costs = measure(tmp_path).costs
    expected = reference_divergences(tmp_path, solved)
    assert {(name, bits) for name, by_bits in costs.items() for bits in by_bits} == expected.keys()
    for (name, bits), divergence in expected.items():
        assert costs[name][bits] == pytest.approx(divergence, rel=2e-3, abs=2e-7)
        assert costs[name][bits] >= 0


def test_a_16_bit_model_is_measured_without_rounding_noise(tmp_path: Path, solved: Solutions) -> None:
    """In bfloat16 rounding errors everywhere would drown the cost of quantizing one linear."""
    save_tiny("llama", tmp_path, dtype=torch.bfloat16)
    assert open_source(str(tmp_path)).dtype == torch.bfloat16
    costs = measure(tmp_path, bits=(6,)).costs
    for (name, bits), divergence in reference_divergences(tmp_path, solved).items():
        assert costs[name][bits] == pytest.approx(divergence, rel=2e-3, abs=2e-7)


@pytest.mark.parametrize("room", [0, 1, 5])
def test_limited_memory_splits_variants_into_groups_with_equal_results(tmp_path: Path, room: int) -> None:
    save_tiny("qwen3", tmp_path)
    in_one_group, step_counts, variant_bytes = in_passes(tmp_path, 1 << 30)
    assert step_counts == [("Comparing", 0)]
    in_groups, step_counts, _ = in_passes(tmp_path, room * variant_bytes)
    assert in_groups == in_one_group
    # There are 42 variants: three blocks of seven linears at two numbers of bits.
    assert max(count for _, count in step_counts) == max(room, 1)
    assert sum(text == "Comparing" for text, _ in step_counts) == -(-42 // max(room, 1))


def test_a_group_reads_later_blocks_at_most_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("qwen3", tmp_path)
    *_, variant_bytes = in_passes(tmp_path, 1 << 30)
    materialise = Source.materialise
    reads: Counter[str] = Counter()

    def spy(source: Source, prefixes: Sequence[str]) -> None:
        block: Any = source.skeleton().get_submodule("model.layers.2")
        on_meta = block.self_attn.q_proj.weight.is_meta
        reads.update(["model.layers.2"] if on_meta and "model.layers.2" in prefixes else [])
        materialise(source, prefixes)

    monkeypatch.setattr(Source, "materialise", spy)
    in_passes(tmp_path, 1 << 30)
    # The original and its float32 copy are both traced, checked and walked through.
    reads_in_one_group = reads["model.layers.2"]
    assert reads_in_one_group == 6
    reads.clear()
    in_passes(tmp_path, 20 * variant_bytes)
    # One group ends inside the second block, so the third is read once more. Another ends inside the third, which is
    # loaded at that time.
    assert reads["model.layers.2"] == reads_in_one_group + 1


@pytest.mark.parametrize("skip", ["model.layers.0", "model.layers.1", "model.layers.2"])
def test_blocks_without_linears_are_passed_through(tmp_path: Path, skip: str) -> None:
    save_tiny("qwen3", tmp_path)
    costs, *_ = in_passes(tmp_path, 1 << 30)
    rest, *_ = in_passes(tmp_path, 1 << 30, (skip,))
    assert rest == {name: by_bits for name, by_bits in costs.items() if not name.startswith(skip)}


def test_the_original_is_not_changed(tmp_path: Path) -> None:
    """Every variant runs through the original's blocks before its own, so a second measurement gives the same costs."""
    save_tiny("llama", tmp_path)
    first = measure(tmp_path, (3,)).costs
    both = measure(tmp_path, (2, 3)).costs
    assert {name: {3: by_bits[3]} for name, by_bits in both.items()} == first


def test_unreached_linears_get_the_median_of_the_others(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    source, structure, trace = opened(tmp_path)
    replay = ProbeModel(BlockwiseModel(source, structure), probe_samples(WINDOWS), 4)
    divergence = Divergence(replay, OPTIONS, (2, 3))
    errors = walk_blocks(BlockwiseModel(source, structure), trace, divergence)
    costs = divergence.costs({**errors.costs, "expert": {2: 0.5, 3: 0.125}})
    for bits, expert_error in ((2, 0.5), (3, 0.125)):
        ratios = torch.tensor([costs[name][bits] / by_bits[bits] for name, by_bits in errors.costs.items()])
        assert costs["expert"][bits] == pytest.approx(expert_error * float(ratios.quantile(0.5)), rel=1e-4)


def test_a_linear_that_breaks_the_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama", tmp_path)
    monkeypatch.setattr(ProbeModel, "divergences", lambda _, __, others: [float("nan")] * len(others))
    with pytest.raises(NumericalError, match=r"model.layers.0.self_attn.q_proj has 2 bits.*`skip`"):
        measure(tmp_path, (2,))


def test_probe_windows_are_few_and_evenly_spaced() -> None:
    windows = torch.arange(100).view(50, 2)
    assert probe_samples(windows)[:, 0].tolist() == [0, 32, 66, 98]
    assert len(probe_samples(windows)) == PROBE_WINDOWS
    assert torch.equal(probe_samples(windows[:3]), windows[:3])
    assert torch.equal(probe_samples(windows[:1]), windows[:1])
