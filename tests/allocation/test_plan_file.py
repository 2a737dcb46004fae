"""A bit plan survives its file, can be compared line by line, and is refused where it does not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from bit_plans import plan_for
from formats import recipe_of
from tiny_models import save_tiny

from shiftadd_cli.allocation.plan_file import BitPlan, load_plan, plan_version
from shiftadd_cli.bcq.choices import Choice, bits_of_choice
from shiftadd_cli.bcq.matrix_format import MatrixStorage
from shiftadd_cli.errors import AllocationError
from shiftadd_cli.pipeline.plan import Plan, make_plan
from shiftadd_cli.source import find_structure, open_source

RECIPE = recipe_of(group_size=16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("plan") / "model")


@pytest.fixture
def plan(model: Path) -> BitPlan:
    return plan_for(model, RECIPE)


def write(tmp_path: Path, content: str | dict[str, Any]) -> Path:
    path = tmp_path / "plan.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_plan_survives_its_file(plan: BitPlan, tmp_path: Path) -> None:
    assert load_plan(write(tmp_path, plan.to_json())) == plan


def test_layers_have_one_line_each_in_order_of_their_numbers(plan: BitPlan) -> None:
    layer = next(iter(plan.layers.values()))
    names = ["b.10.q", "b.9.q", "b.9.k"]
    text = plan.model_copy(update={"layers": dict.fromkeys(names, layer)}).to_json()
    lines = [line.split('"')[1] for line in text.splitlines() if '"bits"' in line]
    assert lines == ["b.9.k", "b.9.q", "b.10.q"]


def test_another_choice_for_a_layer_changes_one_line(plan: BitPlan) -> None:
    name, layer = next(iter(plan.layers.items()))
    other = plan.model_copy(update={"layers": {**plan.layers, name: layer.model_copy(update={"bits": 4})}})
    pairs = zip(plan.to_json().splitlines(), other.to_json().splitlines(), strict=True)
    assert [name in mine for mine, theirs in pairs if mine != theirs] == [True]
    assert plan.fingerprint() != other.fingerprint()


def test_totals_are_those_of_a_run_with_the_plan(plan: BitPlan, model: Path, tmp_path: Path) -> None:
    path = write(tmp_path, plan.to_json())
    run = make_plan(open_source(str(model)), RECIPE.model_copy(update={"bit_plan": str(path)}))
    assert {linear.spec.name: linear.layout.bits for linear in run.linears} == plan.bits
    assert plan.stored_bytes == run.quantized_bytes
    assert plan.weights == run.quantized_weights
    assert (plan.bits_per_weight, plan.planes_per_weight) == (run.bits_per_weight, run.planes_per_weight)
    assert plan.predicted_loss == pytest.approx(sum(4.0 ** -bits_of_choice(choice) for choice in plan.bits.values()))


def refusal_of(plan: BitPlan, model: Path, skip: Sequence[str] = (), **fields: Any) -> str:
    source = open_source(str(model))
    linears = find_structure(source.skeleton(), skip).linears
    storage = RECIPE.model_copy(update=fields).part(MatrixStorage)
    with pytest.raises(AllocationError) as caught:
        plan.check("plan.json", source.fingerprint, storage, linears, {})
    return str(caught.value)


def test_a_plan_of_another_model_is_refused(plan: BitPlan, tmp_path: Path) -> None:
    other = save_tiny("llama", tmp_path / "other", seed=1)
    assert "was made for another model" in refusal_of(plan, other)


def test_a_copy_of_the_model_is_the_same_model(plan: BitPlan, model: Path, tmp_path: Path) -> None:
    source = open_source(str(shutil.copytree(model, tmp_path / "copy")))
    linears = find_structure(source.skeleton()).linears
    plan.check("plan.json", source.fingerprint, RECIPE.part(MatrixStorage), linears, {})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"group_size": 32}, "group_size = 16, and the recipe says 32"),
        ({"scale_format": "pot"}, "scale_format = apot2, and the recipe says pot"),
        ({"offset": True}, "offset = false, and the recipe says true"),
        ({"rotation": "none"}, "rotation = hadamard, and the recipe says none"),
    ],
)
def test_a_plan_for_another_storage_format_is_refused(
    plan: BitPlan, model: Path, fields: dict[str, Any], expected: str
) -> None:
    assert expected in refusal_of(plan, model, **fields)


def test_a_plan_with_too_many_or_too_few_layers_is_refused(plan: BitPlan, model: Path) -> None:
    assert "which this run leaves unquantized" in refusal_of(plan, model, skip=("*.mlp",))
    fewer = plan.model_copy(update={"layers": dict(list(plan.layers.items())[1:])})
    assert f"has no entry for {next(iter(plan.layers))}" in refusal_of(fewer, model)


def test_a_layer_of_another_shape_is_refused(plan: BitPlan, model: Path) -> None:
    name, layer = next(iter(plan.layers.items()))
    wrong = plan.model_copy(update={"layers": {**plan.layers, name: layer.model_copy(update={"shape": (1, 2)})}})
    assert "the shape 1 x 2" in refusal_of(wrong, model)


FAULTS: dict[str, tuple[str | dict[str, Any], str]] = {
    "not json": ("{", "not valid JSON"),
    "deep": ("[" * 100_000, "not valid JSON"),
    "twice": ('{"format": 1, "format": 2}', "'format' is given twice"),
    "a list": ("[]", "is not a bit plan"),
    "another file": ('{"bits": 3}', "is not a bit plan"),
    "no layers": ({"layers": {}}, "layers: "),
    "unknown key": ({"colour": "red"}, "colour: "),
    "later": ({"version": 5}, "has version 5"),
    "trellis too early": (
        {"bytes": {"trellis1-2": 9}, "cost": {"trellis1-2": 9.0}, "bits": "trellis1-2"},
        "need version 3",
    ),
    "shifts too early": ({"bytes": {"shift1-3": 9}, "cost": {"shift1-3": 9.0}, "bits": "shift1"}, "need version 2"),
    "nine bits": ({"bits": 9}, "bits: "),
    "bits not offered": ({"bits": 7}, "bits is 7, which is none of 2, 3, 4"),
    "no cost": ({"cost": {"2": 1.0}}, "bytes and cost"),
    "not a number": ({"cost": {"2": float("nan"), "3": 0.0, "4": 0.0}}, "cost 2: "),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_broken_file_is_refused_in_one_sentence(plan: BitPlan, tmp_path: Path, case: str) -> None:
    content, expected = FAULTS[case]
    if isinstance(content, dict):
        values = json.loads(plan.to_json())
        in_layer = content.keys() & {"bits", "cost", "bytes"}
        (next(iter(values["layers"].values())) if in_layer else values).update(content)
        content = values
    path = write(tmp_path, content)
    with pytest.raises(AllocationError) as caught:
        load_plan(path)
    message = str(caught.value)
    assert expected in message
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 400


def test_a_missing_file_is_refused_with_the_way_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(AllocationError, match="allocate-bits"):
        load_plan(tmp_path / "plan.json")


def with_shifts(plan: BitPlan) -> BitPlan:
    """The plan with one shift layer, which has another shift primitive as a candidate."""
    name, layer = next(iter(plan.layers.items()))
    shifted = layer.model_copy(
        update={
            "bits": "shift2-4",
            "bytes": {**layer.bytes, "shift2-4": 700, "shift1-3": 500},
            "cost": {**layer.cost, "shift2-4": 0.01, "shift1-3": 0.04},
        }
    )
    return plan.model_copy(update={"version": 2, "layers": {**plan.layers, name: shifted}})


def test_a_plan_of_shift_layers_survives_its_file(plan: BitPlan, tmp_path: Path) -> None:
    mixed = with_shifts(plan)
    loaded = load_plan(write(tmp_path, mixed.to_json()))
    assert loaded == mixed
    assert loaded.to_json() == mixed.to_json()
    (shifted,) = (layer for layer in loaded.layers.values() if layer.bits == "shift2-4")
    assert list(shifted.bytes) == [2, 3, 4, "shift1-3", "shift2-4"]
    bits: dict[Choice, int] = {2: 2, 3: 3, 4: 4, "shift2-4": 4}
    assert loaded.planes_per_weight == pytest.approx(
        sum(bits[layer.bits] * layer.weights for layer in loaded.layers.values()) / loaded.weights
    )


def test_a_plan_without_shift_layers_has_version_one(plan: BitPlan) -> None:
    assert json.loads(plan.to_json())["version"] == 1
    assert "shift" not in plan.to_json().split('"layers"')[1]
    assert plan_version(plan.layers.values(), tables=False) == 1
    assert plan_version(with_shifts(plan).layers.values(), tables=False) == 2


def test_a_plan_that_allows_trellis_coded_planes_has_version_three(plan: BitPlan) -> None:
    layer = next(iter(with_shifts(plan).layers.values()))
    coded = layer.model_copy(update={"bytes": {**layer.bytes, "trellis1-2": 600}})
    assert plan_version([layer, coded], tables=False) == 3


EMBED = "model.embed_tokens"


def with_tables(plan: BitPlan, **changes: Any) -> BitPlan:
    layer = next(iter(plan.layers.values())).model_copy(update={"shape": (320, 48), "bits": 2, **changes})
    return plan.model_copy(update={"tables": {EMBED: layer}, "version": 4})


def test_a_plan_with_tables_has_version_four(plan: BitPlan, tmp_path: Path) -> None:
    assert plan_version(plan.layers.values(), tables=True) == 4
    assert "tables" not in json.loads(plan.to_json())
    tabled = with_tables(plan)
    written = json.loads(tabled.to_json())
    assert (written["version"], list(written["tables"])) == (4, [EMBED])
    loaded = load_plan(write(tmp_path, tabled.to_json()))
    assert loaded.to_json() == tabled.to_json()
    assert loaded.choices == {**plan.bits, EMBED: 2}
    # Their size and loss are not those of the layers.
    assert (loaded.stored_bytes, loaded.predicted_loss) == (plan.stored_bytes, plan.predicted_loss)
    with pytest.raises(AllocationError, match="need version 4"):
        load_plan(write(tmp_path, tabled.to_json().replace('"version": 4', '"version": 3')))


def test_tables_that_do_not_fit_the_run_are_refused(plan: BitPlan, model: Path, tmp_path: Path) -> None:
    source = open_source(str(model))

    def run(tabled: BitPlan, **fields: Any) -> Plan:
        path = write(tmp_path, tabled.to_json())
        return make_plan(source, RECIPE.model_copy(update={"bit_plan": str(path), **fields}))

    form = run(with_tables(plan), embedding_bits="auto").tables[0].layout.format
    assert form is not None
    assert form.bits == 2
    with pytest.raises(AllocationError, match=rf"sets the form of {EMBED}, which is not open .*`embedding_bits=auto`"):
        run(with_tables(plan))
    with pytest.raises(AllocationError, match=rf"{EMBED} the shape 48 x 320, but the model has 320 x 48"):
        run(with_tables(plan, shape=(48, 320)), embedding_bits="auto")
    # A plan without tables leaves them in 8-bit rows.
    assert {table.form for table in run(plan, embedding_bits="auto").tables} == {"8-bit rows"}


def test_the_fields_are_those_of_version_four() -> None:
    """A change here needs a new version."""
    assert set(BitPlan.model_fields) == {"format", "version", "model", "storage", "made_by", "layers", "tables"}
