"""From model and budget to a plan, and from the plan to files of the promised size."""

from __future__ import annotations

import itertools

import pytest
from tiny_models import save_tiny

from shiftadd_cli.allocation.budget import Budget
from shiftadd_cli.allocation.plan_file import BitPlan
from shiftadd_cli.bcq.choices import parts_of_choice
from shiftadd_cli.cli.describe_bits import describe_bit_plan
from shiftadd_cli.errors import AllocationError
from shiftadd_cli.pipeline import allocate as allocate_module
from shiftadd_cli.pipeline.allocate import AllocationJob, Request, file_bytes
from shiftadd_cli.pipeline.job import Job
from shiftadd_cli.pipeline.plan import make_plan
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.source import open_source

QUICK = {"samples": 4, "seq_len": 24, "batch_size": 3, "group_size": 16, "fit_rounds": 1}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SHIFTADD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny("llama", tmp_path_factory.mktemp("allocate") / "model"))


def recipe(**fields):
    return Recipe.load("equal-bits", QUICK | fields)


def job_for(model, bits=None, size=None, settings=None, nats=None, **request):
    budget = Budget.parse(bits, size, nats)
    return AllocationJob.prepare(open_source(model), settings or recipe(), Request(budget, **request))


def brute_force(plan, groups, budget):
    """The least predicted loss over all choices for `groups`, by trying them."""
    best = None
    for choice in itertools.product((2, 3), repeat=len(groups)):
        bits = {name: each for names, each in zip(groups, choice, strict=True) for name in names}
        if sum(plan.layers[name].bytes[each] for name, each in bits.items()) <= budget:
            cost = sum(plan.layers[name].cost[each] for name, each in bits.items())
            best = cost if best is None else min(best, cost)
    return best


@pytest.mark.parametrize("tie_fused", [True, False])
def test_the_plan_is_the_best_there_is_within_the_budget(model, tie_fused):
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
def test_the_files_have_the_size_that_was_asked_and_never_more(model, tmp_path, part):
    """From the smallest that is possible upwards."""
    generous = job_for(model, bits=9.0)
    low, high = (file_bytes(generous.plan_at(choose)) for choose in (min, max))
    asked = low + round(part * (high - low))
    job = job_for(model, size=f"{asked / 1000:.3f}KB", tie_fused=False)
    assert job.request.budget.file_bytes == asked
    path = tmp_path / "plan.json"
    path.write_text(job.run().to_json())
    Job.prepare(model, tmp_path / "out", recipe(bit_plan=str(path))).run()
    stored = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert asked * 0.99 <= stored <= asked


def test_kept_and_tied_layers_are_what_was_asked(model):
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


def test_layers_that_are_fused_and_kept_apart_are_refused(model):
    job = job_for(model, bits=6, keep=("*.q_proj=2", "*.k_proj=3"))
    with pytest.raises(AllocationError, match="`tie_fused=False`"):
        job.run()
    plan = job_for(model, bits=6, keep=("*.q_proj=2", "*.k_proj=3"), tie_fused=False).run()
    assert plan.layers["model.layers.0.self_attn.k_proj"].bits == 3


def test_another_budget_measures_nothing_again(model, monkeypatch):
    job_for(model, bits=4.2, candidates=(2, 3)).run()
    measured = []

    def spy(*arguments, **options):
        measured.append(tuple(arguments[5]))
        return real(*arguments, **options)

    real = allocate_module.measure_sensitivities
    monkeypatch.setattr(allocate_module, "measure_sensitivities", spy)
    job_for(model, bits=3.8, candidates=(2, 3)).run()
    job_for(
        model, bits=3.8, candidates=(2, 3), settings=recipe(reconstruct_epochs=1, samples=4, shard_size="1GB")
    ).run()
    assert measured == []
    whole = job_for(model, bits=3.8, candidates=(2, 3, 4)).run()
    assert measured == [(4,)]
    assert {tuple(layer.cost) for layer in whole.layers.values()} == {(2, 3, 4)}
    for settings in (recipe(seed=1), recipe(group_size=8), recipe(weight_error=0.1), recipe(samples=3)):
        job_for(model, bits=5.8, candidates=(2, 3), settings=settings).run()
    for sensitivity in ("paper", "divergence", "divergence"):
        job_for(model, bits=3.8, candidates=(2, 3), sensitivity=sensitivity).run()
    assert measured[1:] == [(2, 3)] * 6


@pytest.mark.parametrize("sensitivity", ["output", "divergence"])
def test_a_plan_measured_in_two_goes_is_that_of_one(model, cache, sensitivity):
    job_for(model, bits=6, candidates=(3,), keep=("*.down_proj=2",), tie_fused=False, sensitivity=sensitivity).run()
    twice = job_for(model, bits=4.4, sensitivity=sensitivity).run()
    for file in (cache / "sensitivities").iterdir():
        file.unlink()
    assert job_for(model, bits=4.4, sensitivity=sensitivity).run() == twice
    # What was decided on is what the file says.
    assert BitPlan.model_validate_json(twice.to_json()) == twice


def test_sensitivities_of_other_windows_are_not_remembered(model, tmp_path, monkeypatch):
    """The same model, text and recipe: with another tokenizer the windows are others."""
    job_for(model, bits=4.2).run()
    monkeypatch.setattr(AllocationJob, "measure", lambda *_: pytest.fail("it was measured again"))
    job_for(model, bits=4.0).run()
    begun = save_tiny("llama", tmp_path / "begun", before=("<|user|>",))
    job = job_for(str(begun), bits=4.2)
    assert job.source.fingerprint == open_source(model).fingerprint
    assert job.recipe_fingerprint == job_for(model, bits=4.2).recipe_fingerprint
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        job.run()


@pytest.mark.parametrize("before", [(), ("<|user|>",)])
def test_a_plan_says_what_its_windows_begin_with(tmp_path, before):
    plan = job_for(str(save_tiny("llama", tmp_path / "model", before=before)), bits=4.2).run()
    assert BitPlan.model_validate_json(plan.to_json()).made_by.calibration.window_start == "".join(before)


@pytest.mark.parametrize(("bits", "size"), [(2.0, None), (None, "20KB")])
def test_a_budget_that_cannot_be_met_is_refused_before_any_work_with_the_range(model, cache, bits, size):
    with pytest.raises(AllocationError) as caught:
        job_for(model, bits=bits, size=size)
    message = str(caught.value)
    low, high = (job_for(model, bits=9.0, keep=(f"*={each}",)).run() for each in (2, 4))
    unit = "bits per weight" if bits else "MB"
    assert unit in message
    if bits:
        assert f"from {low.bits_per_weight:.3f} {unit} to {high.bits_per_weight:.3f} {unit}" in message
    # Exactly the least that is said to be possible is possible.
    assert job_for(model, bits=low.bits_per_weight).run().bits == low.bits


@pytest.mark.parametrize("sensitivity", ["output", "divergence"])
def test_the_smallest_plan_for_a_loss_is_found_and_loses_no_more(model, sensitivity):
    plan_of = lambda **asked: job_for(model, candidates=(2, 3), sensitivity=sensitivity, **asked).run()  # noqa: E731
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
        # One byte less, and nothing loses so little.
        assert brute_force(plan, groups, plan.stored_bytes) == pytest.approx(plan.predicted_loss, rel=1e-9)
        assert (brute_force(plan, groups, plan.stored_bytes - 1) or most) > nats


def test_a_loss_that_no_bits_reach_names_the_range(model):
    low, high = (job_for(model, bits=9.0, keep=(f"*={bits}",)).run().predicted_loss for bits in (4, 2))
    with pytest.raises(AllocationError, match=r"from .* to .*; raise `max_divergence`, or .*`candidates`") as caught:
        job_for(model, nats=low * 0.99).run()
    words = str(caught.value).split("from ")[1].split(";")[0].split(" to ")
    assert [float(word) for word in words] == pytest.approx([low, high], rel=1e-3)
    assert job_for(model, nats=float(words[0])).run().predicted_loss <= float(words[0])


def test_a_loss_without_a_unit_is_no_budget(model):
    with pytest.raises(AllocationError, match=r"nats per token.*`sensitivity` output or divergence"):
        Request(Budget.parse(None, None, 0.1), sensitivity="paper")


def test_a_run_without_text_cannot_measure(model):
    with pytest.raises(AllocationError, match="`calibration`"):
        job_for(model, bits=4.0, settings=Recipe.load("fast", {"group_size": 16}))


def test_the_table_shows_bits_over_depth_and_both_averages(model):
    job = job_for(model, bits=4.2, candidates=(2, 3))
    plan = job.run()
    text = describe_bit_plan(plan, [each.spec for each in job.linears])
    row = next(line for line in text.splitlines() if line.startswith("self_attn.q_proj"))
    assert row.split()[1] == "".join(str(plan.layers[f"model.layers.{i}.self_attn.q_proj"].bits) for i in range(2))
    assert f"{plan.bits_per_weight:.3f} stored bits per weight, {plan.planes_per_weight:.3f} planes" in text
    assert f"{plan.predicted_loss:.4g} (nats/token)" in text
    uniform = sum(layer.cost[3] for layer in plan.layers.values())
    assert f"{uniform:.4g}" in next(line for line in text.splitlines() if line.startswith("uniform 3"))


def test_a_chain_of_ties_follows_the_layer_that_is_kept(model):
    """The query keeps five bits; so does the value, fused with it; so does the output, tied to the value."""
    plan = job_for(model, bits=6, keep=("*.q_proj=5",), tie=("*.v_proj,*.o_proj",), candidates=(2, 3)).run()
    kept = {name.rpartition(".")[2] for name, layer in plan.layers.items() if layer.bits == 5}
    assert kept == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_the_front_is_what_budgets_of_its_sizes_give(model):
    job = job_for(model, bits=6, candidates=(2, 3), keep=("*.0.self_attn.q_proj=3",))
    sensitivities = job.sensitivities()
    front = job.front(sensitivities, 5)
    for point in front:
        plan = job.with_budget(Budget.parse(point.bits_per_weight + 1e-9, None)).choose(sensitivities)
        assert plan.predicted_loss == pytest.approx(point.predicted_loss)
    losses = [point.predicted_loss for point in front]
    assert losses == sorted(losses, reverse=True)
    whole = job.choose(sensitivities)
    assert front[-1] == pytest.approx((whole.bits_per_weight, whole.predicted_loss))
    # Nothing smaller is possible: the kept query takes the key and the value along.
    smallest = sum(min(layer.bytes.values()) for layer in whole.layers.values())
    assert front[0].bits_per_weight == pytest.approx(8 * smallest / whole.weights)


MIXTURE = (2, 3, "shift1-2", "shift2-3", "shift2-4")


def test_a_mixture_of_primitives_is_the_best_there_is_and_is_written_as_planned(model, tmp_path):
    kept = "model.layers.0.self_attn.o_proj"
    job = job_for(model, bits=3.9, candidates=MIXTURE, keep=(f"{kept}=3",))
    plan = job.run()
    assert plan.version == 2
    assert plan.bits_per_weight <= 3.9
    groups = {}
    for name in plan.layers:
        kind = name.rpartition(".")[2]
        fused = "qkv" if kind in ("q_proj", "k_proj", "v_proj") else "up" if kind in ("gate_proj", "up_proj") else kind
        groups.setdefault((name.split(".")[2], fused), []).append(name)
    budget, best = int(3.9 * plan.weights / 8), float("inf")
    allowed = [(3,) if kept in names else MIXTURE for names in groups.values()]
    for choices in itertools.product(*allowed):
        chosen = [(name, choice) for names, choice in zip(groups.values(), choices, strict=True) for name in names]
        if sum(plan.layers[name].bytes[choice] for name, choice in chosen) <= budget:
            best = min(best, sum(plan.layers[name].cost[choice] for name, choice in chosen))
    assert plan.predicted_loss == pytest.approx(best, rel=1e-6)
    for names in groups.values():
        assert len({plan.layers[name].bits for name in names}) == 1
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    report = Job.prepare(model, tmp_path / "out", recipe(bit_plan=str(path))).run()
    assert report.size.quantized_bytes == plan.stored_bytes
    chosen = {layer.name: (layer.primitive, layer.bits) for layer in report.layers}
    assert chosen == {name: parts_of_choice(choice) for name, choice in plan.bits.items()}
    assert {"bcq", "shift2"} <= {primitive for primitive, _ in chosen.values()}
    text = describe_bit_plan(plan, [each.spec for each in job.linears])
    assert "a is shift1-2, b is shift2-3, c is shift2-4" in text
    letters = {2: "2", 3: "3", "shift1-2": "a", "shift2-3": "b", "shift2-4": "c"}
    o_proj = "".join(letters[plan.layers[f"model.layers.{block}.self_attn.o_proj"].bits] for block in range(2))
    assert any(line.split()[:2] == ["self_attn.o_proj", o_proj] for line in text.splitlines())


def test_quantize_takes_shifts_among_its_candidates(model, tmp_path):
    settings = recipe(avg_bits=4.5, candidates=[2, "shift2-4"], shard_size="1GB")
    job = Job.prepare(model, tmp_path / "out", settings)
    report = job.run()
    assert report.size.bits_per_weight <= 4.5
    assert {layer.primitive for layer in report.layers} <= {"bcq", "shift2"}
    assert "shift2" in {layer.primitive for layer in report.layers}


def test_the_smallest_and_the_largest_choice_go_by_what_they_store(model):
    """Two planes in groups of 16 columns take more than two bits of a shift layer with one scale a row."""
    job = job_for(model, bits=3.9, candidates=MIXTURE)
    assert {linear.layout.format.choice for linear in job.plan_at(min).linears} == {"shift1-2"}
    sizes = {choice: make_plan(job.source, job.recipe, dict.fromkeys(job.allowed, choice)) for choice in MIXTURE}
    assert job.plan_at(min).quantized_bytes == min(each.quantized_bytes for each in sizes.values())
    assert job.plan_at(max).quantized_bytes == max(each.quantized_bytes for each in sizes.values())


def test_the_criterion_of_the_paper_has_no_word_for_shifts(model):
    with pytest.raises(AllocationError, match=r"supports only numbers of bits, not shift2-4; use `sensitivity` output"):
        job_for(model, bits=4.5, candidates=(2, "shift2-4"), sensitivity="paper")
    with pytest.raises(AllocationError, match="not shift1-3"):
        job_for(model, bits=4.5, candidates=(2, 3), keep=("*.o_proj=shift1",), sensitivity="paper")


def test_shifts_are_measured_where_only_planes_are_remembered(model):
    before = job_for(model, bits=4.2, candidates=(2, 3)).sensitivities()
    after = job_for(model, bits=4.2, candidates=(2, 3, "shift2-4")).sensitivities()
    for name, costs in before.costs.items():
        assert {choice: cost for choice, cost in after.costs[name].items() if choice != "shift2-4"} == costs
        assert 0 < after.costs[name]["shift2-4"] < costs[3]
