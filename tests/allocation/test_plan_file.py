"""A bit plan survives its file, can be compared line by line, and is refused where it does not fit."""

from __future__ import annotations

import json
import shutil

import pytest
from bit_plans import plan_for
from formats import recipe_of
from tiny_models import save_tiny

from shiftadd_cli.allocation.plan_file import BitPlan, load_plan, plan_version
from shiftadd_cli.bcq.matrix_format import MatrixStorage
from shiftadd_cli.errors import AllocationError
from shiftadd_cli.pipeline.plan import make_plan
from shiftadd_cli.source import find_structure, open_source

RECIPE = recipe_of(group_size=16)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("plan") / "model")


@pytest.fixture
def plan(model):
    return plan_for(model, RECIPE)


def write(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return path


def test_a_plan_survives_its_file(plan, tmp_path):
    assert load_plan(write(tmp_path, plan.to_json())) == plan


def test_layers_stand_one_a_line_in_the_order_of_their_numbers(plan):
    layer = next(iter(plan.layers.values()))
    names = ["b.10.q", "b.9.q", "b.9.k"]
    text = plan.model_copy(update={"layers": dict.fromkeys(names, layer)}).to_json()
    lines = [line.split('"')[1] for line in text.splitlines() if '"bits"' in line]
    assert lines == ["b.9.k", "b.9.q", "b.10.q"]


def test_another_choice_for_a_layer_changes_one_line(plan):
    name, layer = next(iter(plan.layers.items()))
    other = plan.model_copy(update={"layers": {**plan.layers, name: layer.model_copy(update={"bits": 4})}})
    pairs = zip(plan.to_json().splitlines(), other.to_json().splitlines(), strict=True)
    assert [name in mine for mine, theirs in pairs if mine != theirs] == [True]
    assert plan.fingerprint() != other.fingerprint()


def test_totals_are_those_of_a_run_with_the_plan(plan, model, tmp_path):
    path = write(tmp_path, plan.to_json())
    run = make_plan(open_source(str(model)), RECIPE.model_copy(update={"bit_plan": str(path)}))
    assert {each.spec.name: each.layout.bits for each in run.linears} == plan.bits
    assert plan.stored_bytes == run.quantized_bytes
    assert plan.weights == run.quantized_weights
    assert (plan.bits_per_weight, plan.planes_per_weight) == (run.bits_per_weight, run.planes_per_weight)
    assert plan.predicted_loss == pytest.approx(sum(4.0**-bits for bits in plan.bits.values()))


def refusal_of(plan, model, skip=(), **fields):
    source = open_source(str(model))
    linears = find_structure(source.skeleton(), skip).linears
    storage = RECIPE.model_copy(update=fields).part(MatrixStorage)
    with pytest.raises(AllocationError) as caught:
        plan.check("plan.json", source.fingerprint, storage, linears)
    return str(caught.value)


def test_a_plan_of_another_model_is_refused(plan, tmp_path):
    other = save_tiny("llama", tmp_path / "other", seed=1)
    assert "was made for another model" in refusal_of(plan, other)


def test_a_copy_of_the_model_is_the_same_model(plan, model, tmp_path):
    source = open_source(str(shutil.copytree(model, tmp_path / "copy")))
    linears = find_structure(source.skeleton()).linears
    plan.check("plan.json", source.fingerprint, RECIPE.part(MatrixStorage), linears)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"group_size": 32}, "group_size = 16, and the recipe says 32"),
        ({"scale_format": "pot"}, "scale_format = apot2, and the recipe says pot"),
        ({"offset": True}, "offset = false, and the recipe says true"),
        ({"rotation": "none"}, "rotation = hadamard, and the recipe says none"),
    ],
)
def test_a_plan_for_another_way_to_store_is_refused(plan, model, fields, said):
    assert said in refusal_of(plan, model, **fields)


def test_a_plan_that_has_too_many_or_too_few_layers_is_refused(plan, model):
    assert "which this run leaves unquantized" in refusal_of(plan, model, skip=("*.mlp",))
    few = plan.model_copy(update={"layers": dict(list(plan.layers.items())[1:])})
    assert f"has no entry for {next(iter(plan.layers))}" in refusal_of(few, model)


def test_a_layer_of_another_shape_is_refused(plan, model):
    name, layer = next(iter(plan.layers.items()))
    wrong = plan.model_copy(update={"layers": {**plan.layers, name: layer.model_copy(update={"shape": (1, 2)})}})
    assert "the shape 1 x 2" in refusal_of(wrong, model)


BREAKS = {
    "not json": ("{", "not valid JSON"),
    "deep": ("[" * 100_000, "not valid JSON"),
    "twice": ('{"format": 1, "format": 2}', "'format' is given twice"),
    "a list": ("[]", "is not a bit plan"),
    "another file": ('{"bits": 3}', "is not a bit plan"),
    "no layers": ({"layers": {}}, "layers: "),
    "unknown key": ({"colour": "red"}, "colour: "),
    "later": ({"version": 3}, "has version 3"),
    "shifts too early": ({"bytes": {"shift1-3": 9}, "cost": {"shift1-3": 9.0}, "bits": "shift1"}, "need version 2"),
    "nine bits": ({"bits": 9}, "bits: "),
    "bits not offered": ({"bits": 7}, "bits is 7, which is none of 2, 3, 4"),
    "no cost": ({"cost": {"2": 1.0}}, "bytes and cost"),
    "not a number": ({"cost": {"2": float("nan"), "3": 0.0, "4": 0.0}}, "cost 2: "),
}


@pytest.mark.parametrize("case", BREAKS)
def test_a_broken_file_is_refused_in_one_sentence(plan, tmp_path, case):
    change, said = BREAKS[case]
    if isinstance(change, dict):
        values = json.loads(plan.to_json())
        inner = change.keys() & {"bits", "cost", "bytes"}
        (next(iter(values["layers"].values())) if inner else values).update(change)
        change = values
    path = write(tmp_path, change)
    with pytest.raises(AllocationError) as caught:
        load_plan(path)
    message = str(caught.value)
    assert said in message
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 400


def test_a_file_that_is_not_there_says_how_to_make_one(tmp_path):
    with pytest.raises(AllocationError, match="allocate-bits"):
        load_plan(tmp_path / "plan.json")


def with_shifts(plan):
    """The plan with a shift layer, which others may be as well."""
    name, layer = next(iter(plan.layers.items()))
    shifted = layer.model_copy(
        update={
            "bits": "shift2-4",
            "bytes": {**layer.bytes, "shift2-4": 700, "shift1-3": 500},
            "cost": {**layer.cost, "shift2-4": 0.01, "shift1-3": 0.04},
        }
    )
    return plan.model_copy(update={"version": 2, "layers": {**plan.layers, name: shifted}})


def test_a_plan_of_shift_layers_survives_its_file(plan, tmp_path):
    mixed = with_shifts(plan)
    loaded = load_plan(write(tmp_path, mixed.to_json()))
    assert loaded == mixed
    assert loaded.to_json() == mixed.to_json()
    (shifted,) = (layer for layer in loaded.layers.values() if layer.bits == "shift2-4")
    assert list(shifted.bytes) == [2, 3, 4, "shift1-3", "shift2-4"]
    bits = {2: 2, 3: 3, 4: 4, "shift2-4": 4}
    assert loaded.planes_per_weight == pytest.approx(
        sum(bits[layer.bits] * layer.weights for layer in loaded.layers.values()) / loaded.weights
    )


def test_a_plan_of_planes_alone_is_written_as_ever(plan):
    assert json.loads(plan.to_json())["version"] == 1
    assert "shift" not in plan.to_json().split('"layers"')[1]
    assert plan_version(plan.layers.values()) == 1
    assert plan_version(with_shifts(plan).layers.values()) == 2


def test_the_format_is_that_of_version_two():
    """A change here needs a new version."""
    assert set(BitPlan.model_fields) == {"format", "version", "model", "storage", "made_by", "layers"}
