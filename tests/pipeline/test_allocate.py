"""From a model and a budget to a plan, and from the plan to files of the promised size."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_tiny

from shiftadd_cli.allocation.budget import Budget
from shiftadd_cli.allocation.plan_file import BitPlan
from shiftadd_cli.allocation.sensitivity import Sensitivities, SensitivityKind, measure_sensitivities
from shiftadd_cli.artifact.format import ArtifactFormat
from shiftadd_cli.bcq.choices import Choice, parts_of_choice
from shiftadd_cli.blockwise.trace import trace_model
from shiftadd_cli.calibration import hessian
from shiftadd_cli.cli.describe_bits import describe_bit_plan
from shiftadd_cli.errors import AllocationError
from shiftadd_cli.pipeline import allocate as allocate_module
from shiftadd_cli.pipeline.allocate import AllocationJob, Request
from shiftadd_cli.pipeline.job import Job
from shiftadd_cli.pipeline.plan import make_plan
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.source import open_source

QUICK: dict[str, Any] = {"samples": 4, "seq_len": 24, "batch_size": 3, "group_size": 16, "fit_rounds": 1}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHIFTADD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny("llama", tmp_path_factory.mktemp("allocate") / "model"))


def recipe(**fields: Any) -> Recipe:
    return Recipe.load("equal-bits", QUICK | fields)


def job_for(
    model: str,
    bits: float | None = None,
    size: str | None = None,
    settings: Recipe | None = None,
    nats: float | None = None,
    **request: Any,
) -> AllocationJob:
    budget = Budget.parse(bits, size, nats)
    return AllocationJob.prepare(open_source(model), settings or recipe(), Request(budget, **request))


def brute_force(plan: BitPlan, groups: Sequence[tuple[str, ...]], budget: int) -> float | None:
    """The least predicted loss over all choices for `groups`, by trying them."""
    best = None
    for choices in itertools.product((2, 3), repeat=len(groups)):
        bits = {name: choice for names, choice in zip(groups, choices, strict=True) for name in names}
        if sum(plan.layers[name].bytes[choice] for name, choice in bits.items()) <= budget:
            cost = sum(plan.layers[name].cost[choice] for name, choice in bits.items())
            best = cost if best is None else min(best, cost)
    return best


@pytest.mark.parametrize("tie_fused", [True, False])
def test_plan_is_optimal_within_the_budget(model: str, tie_fused: bool) -> None:
    job = job_for(model, bits=4.2, candidates=(2, 3), tie_fused=tie_fused)
    plan = job.run()
    assert plan.bits_per_weight <= 4.2
    blocks = [f"model.layers.{number}" for number in range(2)]
    fused = [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")]
    alone = [("self_attn.o_proj",), ("mlp.down_proj",)]
    kinds = [*fused, *alone] if tie_fused else [(kind,) for names in (*fused, *alone) for kind in names]
    groups = [tuple(f"{block}.{kind}" for kind in names) for block in blocks for names in kinds]
    assert plan.predicted_loss == pytest.approx(brute_force(plan, groups, int(4.2 * plan.weights / 8)), rel=1e-6)
    for names in groups:
        assert len({plan.layers[name].bits for name in names}) == 1


@pytest.mark.parametrize("part", [0.0, 0.3, 0.8])
def test_files_fill_the_requested_size_and_never_exceed_it(model: str, tmp_path: Path, part: float) -> None:
    """From the smallest possible size upwards."""
    generous = job_for(model, bits=9.0)
    low, high = (generous.plan_at(choose).file_bytes for choose in (min, max))
    target = low + round(part * (high - low))
    job = job_for(model, size=f"{target / 1000:.3f}KB", tie_fused=False)
    budget = job.request.budget
    assert isinstance(budget, Budget)
    assert budget.file_bytes == target
    path = tmp_path / "plan.json"
    path.write_text(job.run().to_json())
    Job.prepare(model, tmp_path / "out", recipe(bit_plan=str(path))).run()
    stored = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert target * 0.99 <= stored <= target


@pytest.mark.parametrize("unit", ["avg_file_bits", "target_size"])
def test_run_fills_the_file_that_its_recipe_allows(model: str, tmp_path: Path, unit: str) -> None:
    generous = job_for(model, bits=9.0)
    low, high = (generous.plan_at(choose).file_bytes for choose in (min, max))

    def at(size: int) -> Recipe:
        bits = 8 * size / generous.plan_at(min).parameters
        return recipe(tie_fused=False, **{unit: bits if unit == "avg_file_bits" else f"{size / 1000:.3f}KB"})

    target = (low + high) // 2
    run = Job.prepare(model, tmp_path / "out", at(target))
    assert target - 2 <= run.plan.most_bytes <= target
    report = run.run()
    assert report is not None
    assert target * 0.99 <= report.size.files_bytes <= target
    with pytest.raises(AllocationError, match="cannot be met: the allowed bits take from"):
        Job.prepare(model, tmp_path / "less", at(low - 100))


OPEN: dict[str, Any] = {"embedding_bits": "auto", "candidates": (2, 3, "trellis1-4", "shift2-4")}
FORMS = (2, 3, 8, "trellis1-4")


@pytest.fixture(scope="module")
def opened(model: str, tmp_path_factory: pytest.TempPathFactory) -> Sensitivities:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHIFTADD_CACHE", str(tmp_path_factory.mktemp("cache")))
        job = job_for(model, bits=9.0, settings=recipe(**OPEN), candidates=(2, 3, "trellis1-4"))
        first, again = job.sensitivities(), job.sensitivities()
        assert first == again
        return first


def test_every_form_of_embedding_and_head_has_a_loss(opened: Sensitivities) -> None:
    assert list(opened.tables) == ["model.embed_tokens", "lm_head"]
    for costs in opened.tables.values():
        # Shifts have no kernels.
        assert set(costs) == set(FORMS)
        assert 0 < costs[8] < costs["trellis1-4"] < costs[3] < costs[2]


@pytest.mark.parametrize("part", [0.05, 0.4, 0.9])
def test_one_budget_of_the_file_is_spent_on_layers_and_tables(model: str, opened: Sensitivities, part: float) -> None:
    settings, candidates = recipe(**OPEN), (2, 3, "trellis1-4")
    generous = job_for(model, bits=9.0, settings=settings, candidates=candidates)
    low, high = (generous.plan_at(choose).file_bytes for choose in (min, max))
    target = low + round(part * (high - low))
    job = job_for(model, size=f"{target / 1000:.3f}KB", settings=settings, candidates=candidates, tie_fused=False)
    plan = job.choose(opened)
    stored = job.data.plan.at(plan.choices).file_bytes
    assert stored <= target
    # No other single choice that fits has less loss.
    parts = {**plan.layers, **plan.tables}
    for name, layer in parts.items():
        for choice, size in layer.bytes.items():
            if stored - layer.bytes[layer.bits] + size + 64 <= target:
                assert layer.cost[choice] >= layer.cost[layer.bits], name


def test_tables_pay_the_price_of_the_layers(model: str, opened: Sensitivities) -> None:
    """With a budget of the layers, a table gets the form that a byte of the layers pays for."""
    chosen = []
    for bits in (3.5, 4.0, 5.5, 9.0):
        job = job_for(model, bits=bits, settings=recipe(**OPEN), candidates=(2, 3, "trellis1-4"))
        plan = job.choose(opened)
        assert plan.bits_per_weight <= bits
        chosen.append([plan.tables[name].bytes[plan.tables[name].bits] for name in plan.tables])
        assert job.data.plan.at(plan.choices).table_bytes == sum(chosen[-1])
    assert all(one <= other for less, more in pairwise(chosen) for one, other in zip(less, more, strict=True))
    assert plan.tables["lm_head"].bits == 8


def test_a_predicted_loss_includes_that_of_tables(model: str, opened: Sensitivities) -> None:
    job = job_for(model, nats=0.5, settings=recipe(**OPEN), candidates=(2, 3, "trellis1-4"))
    plan = job.choose(opened)
    losses = [layer.cost[layer.bits] for layer in (*plan.layers.values(), *plan.tables.values())]
    assert sum(losses) <= 0.5


def test_the_paper_has_no_embeddings(model: str) -> None:
    job = job_for(model, bits=4.2, settings=recipe(**OPEN), sensitivity="paper", candidates=(2, 3))
    assert job.tables == ()
    assert job.run().tables == {}


@pytest.mark.parametrize("size", [None, 1])
def test_run_chooses_the_form_of_its_embedding(model: str, tmp_path: Path, size: int | None) -> None:
    generous = job_for(model, bits=9.0, settings=recipe(**OPEN), candidates=(2, 3, "trellis1-4"))
    target = (generous.plan_at(min).file_bytes + generous.plan_at(max).file_bytes) // 2
    budget = {"avg_bits": 4.2} if size is None else {"target_size": f"{target / 1000:.3f}KB"}
    run = Job.prepare(model, tmp_path / "out", recipe(**OPEN, **budget))
    most = run.plan.most_bytes
    report = run.run()
    assert report is not None
    assert report.size.files_bytes <= most
    assert [table.modules for table in report.tables] == [["model.embed_tokens"], ["lm_head"]]
    forms = ArtifactFormat.from_dict(json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"])
    stored = {name: None if table.format is None else table.format.bits for name, table in forms.tables.items()}
    assert stored == {table.modules[0]: table.bits if table.primitive else None for table in report.tables}


def test_keep_and_tie_options_are_respected(model: str) -> None:
    plan = job_for(model, bits=6, keep=("*.down_proj=2", "*.0.self_attn.q_proj=4"), tie=("*.o_proj,*.gate_proj",)).run()
    for block in range(2):
        layers = {
            name.rpartition(".")[2]: layer.bits
            for name, layer in plan.layers.items()
            if name.split(".")[2] == str(block)
        }
        assert layers["down_proj"] == 2
        assert layers["o_proj"] == layers["gate_proj"] == layers["up_proj"]
        assert layers["q_proj"] == layers["k_proj"] == layers["v_proj"]
    assert plan.layers["model.layers.0.self_attn.v_proj"].bits == 4


def test_fused_layers_kept_at_different_bits_are_refused(model: str) -> None:
    job = job_for(model, bits=6, keep=("*.q_proj=2", "*.k_proj=3"))
    with pytest.raises(AllocationError, match="`tie_fused=False`"):
        job.run()
    plan = job_for(model, bits=6, keep=("*.q_proj=2", "*.k_proj=3"), tie_fused=False).run()
    assert plan.layers["model.layers.0.self_attn.k_proj"].bits == 3


def test_another_budget_reuses_the_measurements(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    job_for(model, bits=4.2, candidates=(2, 3)).run()
    measured: list[tuple[Choice, ...]] = []

    def spy(*arguments: Any, **options: Any) -> Sensitivities:
        measured.append(tuple(arguments[5]))
        return real(*arguments, **options)

    real = allocate_module.measure_sensitivities
    monkeypatch.setattr(allocate_module, "measure_sensitivities", spy)
    job_for(model, bits=3.8, candidates=(2, 3)).run()
    job_for(
        model, bits=3.8, candidates=(2, 3), settings=recipe(reconstruct_epochs=1, samples=4, shard_size="1GB")
    ).run()
    assert measured == []
    plan = job_for(model, bits=3.8, candidates=(2, 3, 4)).run()
    assert measured == [(4,)]
    assert {tuple(layer.cost) for layer in plan.layers.values()} == {(2, 3, 4)}
    for settings in (recipe(seed=1), recipe(group_size=8), recipe(weight_error=0.1), recipe(samples=3)):
        job_for(model, bits=5.8, candidates=(2, 3), settings=settings).run()
    for sensitivity in ("paper", "divergence", "divergence"):
        job_for(model, bits=3.8, candidates=(2, 3), sensitivity=sensitivity).run()
    assert measured[1:] == [(2, 3)] * 6


@pytest.mark.parametrize("sensitivity", ["output", "divergence"])
def test_measuring_in_two_steps_gives_the_same_plan(model: str, cache: Path, sensitivity: SensitivityKind) -> None:
    job_for(model, bits=6, candidates=(3,), keep=("*.down_proj=2",), tie_fused=False, sensitivity=sensitivity).run()
    plan = job_for(model, bits=4.4, sensitivity=sensitivity).run()
    for file in (cache / "sensitivities").iterdir():
        file.unlink()
    assert job_for(model, bits=4.4, sensitivity=sensitivity).run() == plan
    # The plan survives a round trip through its file.
    assert BitPlan.model_validate_json(plan.to_json()) == plan


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_estimates_use_as_many_samples_as_their_inputs_need(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(save_tiny(family, tmp_path / "model"))
    settings = recipe(samples=12, seq_len=64)
    monkeypatch.setattr(hessian, "_TOKENS", 100)
    monkeypatch.setattr(hessian, "_TOKENS_PER_INPUT", 0.5)
    job = job_for(path, bits=6.0, settings=settings, candidates=(3, 4))
    # An expert of the mixture reads half of the tokens.
    assert job.stride == {"llama": 7, "mixtral": 3}[family]
    assert job_for(path, bits=6.0, settings=settings, sensitivity="divergence").stride == 1
    samples, model = job.calibration.samples[:: job.stride], job.model
    with model.outside():
        trace = trace_model(model, samples, settings.batch_size)
        expected = measure_sensitivities("output", model, samples, trace, settings.solver_options, (3, 4), seed=0)
    assert job.sensitivities().costs == expected.costs


def test_other_windows_are_measured_again(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model, text and recipe are the same, but another tokenizer gives other windows."""
    job_for(model, bits=4.2).run()
    monkeypatch.setattr(AllocationJob, "measure", lambda *_: pytest.fail("it was measured again"))
    job_for(model, bits=4.0).run()
    other = save_tiny("llama", tmp_path / "other", before=("<|user|>",))
    job = job_for(str(other), bits=4.2)
    assert job.source.fingerprint == open_source(model).fingerprint
    assert job.recipe_fingerprint == job_for(model, bits=4.2).recipe_fingerprint
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        job.run()


@pytest.mark.parametrize("before", [(), ("<|user|>",)])
def test_plan_records_the_window_start(tmp_path: Path, before: tuple[str, ...]) -> None:
    plan = job_for(str(save_tiny("llama", tmp_path / "model", before=before)), bits=4.2).run()
    assert BitPlan.model_validate_json(plan.to_json()).made_by.calibration.window_start == "".join(before)


@pytest.mark.parametrize(("bits", "size"), [(2.0, None), (None, "20KB")])
def test_impossible_budget_is_refused_before_any_work_with_the_range(
    model: str, cache: Path, bits: float | None, size: str | None
) -> None:
    with pytest.raises(AllocationError) as caught:
        job_for(model, bits=bits, size=size)
    assert not list(cache.rglob("*.json")), "nothing was measured"
    message = str(caught.value)
    low, high = (job_for(model, bits=9.0, keep=(f"*={bits_kept}",)).run() for bits_kept in (2, 4))
    unit = "bits per weight" if bits else "MB"
    assert unit in message
    if bits:
        assert f"from {low.bits_per_weight:.3f} {unit} to {high.bits_per_weight:.3f} {unit}" in message
    # The lower end of that range can be met.
    assert job_for(model, bits=low.bits_per_weight).run().bits == low.bits


@pytest.mark.parametrize("sensitivity", ["output", "divergence"])
def test_loss_budget_gives_the_smallest_plan_that_meets_it(model: str, sensitivity: SensitivityKind) -> None:
    def plan_of(**request: Any) -> BitPlan:
        return job_for(model, candidates=(2, 3), sensitivity=sensitivity, **request).run()

    most, least = (plan_of(bits=9.0, keep=(f"*={bits}",)).predicted_loss for bits in (2, 3))
    for part in (0.1, 0.5, 0.9):
        nats = least + part * (most - least)
        plan = plan_of(nats=nats)
        assert plan.predicted_loss <= nats
        assert plan.made_by.budget == f"{nats:g} nats/token of predicted loss"
        blocks = [f"model.layers.{number}" for number in range(2)]
        fused = [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")]
        kinds = [*fused, ("self_attn.o_proj",), ("mlp.down_proj",)]
        groups = [tuple(f"{block}.{kind}" for kind in names) for block in blocks for names in kinds]
        # With one byte less, every choice loses more.
        assert brute_force(plan, groups, plan.stored_bytes) == pytest.approx(plan.predicted_loss, rel=1e-9)
        assert (brute_force(plan, groups, plan.stored_bytes - 1) or most) > nats


def test_unreachable_loss_budget_names_the_range(model: str) -> None:
    low, high = (job_for(model, bits=9.0, keep=(f"*={bits}",)).run().predicted_loss for bits in (4, 2))
    with pytest.raises(AllocationError, match=r"from .* to .*; raise `max_divergence`, or .*`candidates`") as caught:
        job_for(model, nats=low * 0.99).run()
    words = str(caught.value).split("from ")[1].split(";")[0].split(" to ")
    assert [float(word) for word in words] == pytest.approx([low, high], rel=1e-3)
    assert job_for(model, nats=float(words[0])).run().predicted_loss <= float(words[0])


def test_loss_budget_needs_a_sensitivity_with_a_unit(model: str) -> None:
    with pytest.raises(AllocationError, match=r"nats per token.*`sensitivity` output or divergence"):
        Request(Budget.parse(None, None, 0.1), sensitivity="paper")


def test_recipe_without_calibration_cannot_measure(model: str) -> None:
    with pytest.raises(AllocationError, match="`calibration`"):
        job_for(model, bits=4.0, settings=Recipe.load("fast", {"group_size": 16}))


def test_table_shows_bits_over_depth_and_both_averages(model: str) -> None:
    job = job_for(model, bits=4.2, candidates=(2, 3))
    plan = job.run()
    text = describe_bit_plan(plan, [linear.spec for linear in job.linears])
    row = next(line for line in text.splitlines() if line.startswith("self_attn.q_proj"))
    assert row.split()[1] == "".join(str(plan.layers[f"model.layers.{i}.self_attn.q_proj"].bits) for i in range(2))
    assert f"{plan.bits_per_weight:.3f} stored bits per weight, {plan.planes_per_weight:.3f} without scales" in text
    assert f"{plan.predicted_loss:.4g} (nats/token)" in text
    uniform = sum(layer.cost[3] for layer in plan.layers.values())
    assert f"{uniform:.4g}" in next(line for line in text.splitlines() if line.startswith("uniform 3"))


def test_chain_of_ties_follows_the_kept_layer(model: str) -> None:
    """The query keeps five bits. The value is fused with it, and the output is tied to the value."""
    plan = job_for(model, bits=6, keep=("*.q_proj=5",), tie=("*.v_proj,*.o_proj",), candidates=(2, 3)).run()
    kinds = {name.rpartition(".")[2] for name, layer in plan.layers.items() if layer.bits == 5}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_front_matches_the_plans_at_its_sizes(model: str) -> None:
    job = job_for(model, bits=6, candidates=(2, 3), keep=("*.0.self_attn.q_proj=3",))
    sensitivities = job.sensitivities()
    front = job.front(sensitivities, 5)
    for point in front:
        plan = job.with_budget(Budget.parse(point.bits_per_weight + 1e-9, None)).choose(sensitivities)
        assert plan.predicted_loss == pytest.approx(point.predicted_loss)
    losses = [point.predicted_loss for point in front]
    assert losses == sorted(losses, reverse=True)
    best = job.choose(sensitivities)
    assert front[-1] == pytest.approx((best.bits_per_weight, best.predicted_loss))
    # Nothing smaller is possible: the key and the value follow the kept query.
    smallest = sum(min(layer.bytes.values()) for layer in best.layers.values())
    assert front[0].bits_per_weight == pytest.approx(8 * smallest / best.weights)


MIXTURE: tuple[Choice, ...] = (2, 3, "shift1-2", "shift2-3", "shift2-4")


def test_mixture_of_primitives_is_optimal_and_written_as_planned(model: str, tmp_path: Path) -> None:
    pinned = "model.layers.0.self_attn.o_proj"
    job = job_for(model, bits=3.9, candidates=MIXTURE, keep=(f"{pinned}=3",))
    plan = job.run()
    assert plan.version == 2
    assert plan.bits_per_weight <= 3.9
    groups: dict[tuple[str, str], list[str]] = {}
    for name in plan.layers:
        kind = name.rpartition(".")[2]
        kind_group = (
            "qkv" if kind in ("q_proj", "k_proj", "v_proj") else "up" if kind in ("gate_proj", "up_proj") else kind
        )
        groups.setdefault((name.split(".")[2], kind_group), []).append(name)
    budget, best = int(3.9 * plan.weights / 8), float("inf")
    allowed: list[tuple[Choice, ...]] = [(3,) if pinned in names else MIXTURE for names in groups.values()]
    for choices in itertools.product(*allowed):
        assignment = [(name, choice) for names, choice in zip(groups.values(), choices, strict=True) for name in names]
        if sum(plan.layers[name].bytes[choice] for name, choice in assignment) <= budget:
            best = min(best, sum(plan.layers[name].cost[choice] for name, choice in assignment))
    assert plan.predicted_loss == pytest.approx(best, rel=1e-6)
    for names in groups.values():
        assert len({plan.layers[name].bits for name in names}) == 1
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    report = Job.prepare(model, tmp_path / "out", recipe(bit_plan=str(path))).run()
    assert report is not None
    assert report.size.quantized_bytes == plan.stored_bytes
    chosen = {layer.name: (layer.primitive, layer.bits) for layer in report.layers}
    assert chosen == {name: parts_of_choice(choice) for name, choice in plan.bits.items()}
    assert {"bcq", "shift2"} <= {primitive for primitive, _ in chosen.values()}
    text = describe_bit_plan(plan, [linear.spec for linear in job.linears])
    assert "a is shift1-2, b is shift2-3, c is shift2-4" in text
    letters: dict[Choice, str] = {2: "2", 3: "3", "shift1-2": "a", "shift2-3": "b", "shift2-4": "c"}
    o_proj = "".join(letters[plan.layers[f"model.layers.{block}.self_attn.o_proj"].bits] for block in range(2))
    assert any(line.split()[:2] == ["self_attn.o_proj", o_proj] for line in text.splitlines())


def test_quantize_accepts_shift_candidates(model: str, tmp_path: Path) -> None:
    settings = recipe(avg_bits=4.5, candidates=[2, "shift2-4"], shard_size="1GB")
    job = Job.prepare(model, tmp_path / "out", settings)
    report = job.run()
    assert report is not None
    assert report.size.bits_per_weight <= 4.5
    assert {layer.primitive for layer in report.layers} <= {"bcq", "shift2"}
    assert "shift2" in {layer.primitive for layer in report.layers}


def test_smallest_and_largest_choices_are_by_stored_size(model: str) -> None:
    """Two planes in groups of 16 columns take more space than two-bit shifts with one scale per row."""
    job = job_for(model, bits=3.9, candidates=MIXTURE)
    assert {linear.layout.format.choice for linear in job.plan_at(min).linears} == {"shift1-2"}
    sizes = {choice: make_plan(job.source, job.recipe, dict.fromkeys(job.allowed, choice)) for choice in MIXTURE}
    assert job.plan_at(min).quantized_bytes == min(plan.quantized_bytes for plan in sizes.values())
    assert job.plan_at(max).quantized_bytes == max(plan.quantized_bytes for plan in sizes.values())


def test_paper_sensitivity_refuses_shifts(model: str) -> None:
    with pytest.raises(AllocationError, match=r"supports only numbers of bits, not shift2-4; use `sensitivity` output"):
        job_for(model, bits=4.5, candidates=(2, "shift2-4"), sensitivity="paper")
    with pytest.raises(AllocationError, match="not shift1-3"):
        job_for(model, bits=4.5, candidates=(2, 3), keep=("*.o_proj=shift1",), sensitivity="paper")


def test_shifts_are_measured_when_only_planes_are_cached(model: str) -> None:
    before = job_for(model, bits=4.2, candidates=(2, 3)).sensitivities()
    after = job_for(model, bits=4.2, candidates=(2, 3, "shift2-4")).sensitivities()
    for name, costs in before.costs.items():
        assert {choice: cost for choice, cost in after.costs[name].items() if choice != "shift2-4"} == costs
        assert 0 < after.costs[name]["shift2-4"] < costs[3]
