"""Recipe fields, their valid combinations, and the packaged recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from formats import recipe_of
from pydantic import ValidationError
from recipe_faults import refusal

from shiftadd_cli.bcq.choices import bits_of_choice, parts_of_choice
from shiftadd_cli.bcq.grid import ScaleGrid
from shiftadd_cli.errors import RecipeError
from shiftadd_cli.recipe import BITS, Recipe
from shiftadd_cli.recipe_file import configs_folder, packaged_names


def test_packaged_recipes_are_the_documented_ones() -> None:
    papers = ("shiftaddllm-acc", "shiftaddllm-lat", "shiftaddvit")
    assert packaged_names() == ("best", "default", "equal-bits", "fast", "gptq", "rtn", *papers)


@pytest.mark.parametrize("name", packaged_names())
def test_packaged_recipe_loads_and_describes_itself(name: str) -> None:
    Recipe.load(name)
    header = (configs_folder() / f"{name}.yaml").read_text()
    for heading in ("# What: ", "# Source: ", "# Use it: "):
        assert heading in header


def test_default_states_every_field_except_alternatives_to_avg_bits() -> None:
    stated = yaml.safe_load((configs_folder() / "default.yaml").read_text())
    assert [*stated] == [name for name in Recipe.model_fields if name not in BITS or name == "avg_bits"]


@pytest.mark.parametrize(
    ("text", "ways"),
    [
        ("seed: 1\n", {"avg_bits": 3.4}),
        ("bits: 2\n", {"bits": 2}),
        ("avg_bits: 2.5\n", {"avg_bits": 2.5}),
        ("bit_plan: plan.json\n", {"bit_plan": "plan.json"}),
        ("primitive: shift1\n", {"bits": 3}),
        ("primitive: shift2\nbits: 5\n", {"bits": 5}),
    ],
)
def test_file_sets_bits_in_its_own_way_or_gets_the_default(tmp_path: Path, text: str, ways: dict[str, Any]) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    recipe = Recipe.load(str(tmp_path / "mine.yaml"))
    assert {name: getattr(recipe, name) for name in BITS if getattr(recipe, name) is not None} == ways


def test_shift_primitives_keep_explicit_bits() -> None:
    assert recipe_of(bits=2).changed({"primitive": "shift1"}).bits == 2
    assert recipe_of(avg_bits=2.5).changed({"primitive": "shift1"}).bits == 3


def test_unnamed_recipe_is_the_default() -> None:
    assert Recipe.load() == Recipe.load("default")


def test_best_is_the_default_with_tuning() -> None:
    best, default = Recipe.load("best"), Recipe.load()
    changed = {name for name in Recipe.model_fields if getattr(best, name) != getattr(default, name)}
    assert changed == {"candidates", "reconstruct_epochs", "distill_epochs"}
    bits = [[bits_of_choice(choice) for choice in recipe.candidates] for recipe in (best, default)]
    assert sorted(bits[0]) == sorted(bits[1])


@pytest.mark.parametrize(
    ("name", "shape", "fit", "sweep"),
    [("shiftaddllm-acc", (768, 1), "greedy", "dynamic"), ("shiftaddllm-lat", (96, 8), "greedy", "dynamic")],
)
def test_recipes_of_the_paper_have_its_group_shapes(name: str, shape: tuple[int, int], fit: str, sweep: str) -> None:
    recipe = Recipe.load(name)
    grid = ScaleGrid.resolve(768, 3072, recipe.group_rows, recipe.group_size)
    assert (grid.group_rows, grid.group_columns) == shape
    assert (recipe.fit, recipe.sweep, recipe.sweep_order, recipe.scale_format) == (fit, sweep, "hessian", "apot3")
    assert recipe.refine_rounds == 0
    assert not recipe.row_scale


def test_shiftaddvit_is_equal_bits_with_other_candidates() -> None:
    recipe, equal_bits = Recipe.load("shiftaddvit"), Recipe.load("equal-bits")
    changed = {name for name in Recipe.model_fields if getattr(recipe, name) != getattr(equal_bits, name)}
    assert changed == {"bits", "avg_bits", "candidates"}
    assert {parts_of_choice(choice)[0] for choice in recipe.candidates} == {"bcq", "shift1", "shift2"}


@pytest.mark.parametrize("name", ["fast", "rtn"])
def test_data_free_recipes_need_no_calibration(name: str) -> None:
    recipe = Recipe.load(name)
    assert (recipe.calibration, recipe.sweep, recipe.refine_rounds) == ("none", "none", 0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bits": 2, "avg_bits": 2.5}, ["`bits`", "`avg_bits`"]),
        ({"avg_bits": 2.5, "bit_plan": "plan.json"}, ["`avg_bits`", "`bit_plan`"]),
        ({"avg_bits": 2.5, "calibration": "none", "sweep": "none", "refine_rounds": 0}, ["avg_bits", "calibration"]),
    ],
)
def test_exclusive_fields_are_refused(tmp_path: Path, fields: dict[str, Any], words: list[str]) -> None:
    message = refusal(tmp_path, "", **fields)
    assert all(word in message for word in words)


def test_file_that_sets_bits_in_two_ways_is_refused(tmp_path: Path) -> None:
    assert "give one of them" in refusal(tmp_path, "avg_bits: 2.5\nbit_plan: plan.json\n")


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("bits", "0"),
        ("bits", "9"),
        ("bits", "yes"),
        ("bits", "'3'"),
        ("bits", "3.0"),
        ("avg_bits", "0"),
        ("avg_bits", "'3'"),
        ("avg_bits", ".nan"),
        ("candidates", "[]"),
        ("candidates", "[2, 9]"),
        ("candidates", "[2, true]"),
        ("candidates", "2"),
        ("candidates", "[shift3]"),
        ("candidates", "[2, shift1-5]"),
        ("primitive", "shift"),
        ("primitive", "null"),
        ("bit_plan", "3"),
        ("bit_plan", "''"),
        ("group_size", "0"),
        ("group_size", "-64"),
        ("group_size", "true"),
        ("group_size", "'64'"),
        ("group_size", "1/8"),
        ("group_rows", "1/0"),
        ("group_rows", "2/8"),
        ("group_rows", "0"),
        ("scale_format", "apot4"),
        ("row_scale", "1"),
        ("fit_rounds", "-1"),
        ("weight_error", "-0.1"),
        ("weight_error", ".nan"),
        ("weight_error", ".inf"),
        ("refine_rounds", "-1"),
        ("descent_passes", "0"),
        ("calibration", "''"),
        ("calibration", "2020-01-01"),
        ("samples", "0"),
        ("seq_len", "1"),
        ("batch_size", "0"),
        ("skip", "lm_head"),
        ("skip", "[1]"),
        ("skip", "['']"),
        ("seed", "-1"),
        ("seed", "9223372036854775808"),
        ("dtype", "float64"),
        ("shard_size", "2"),
        ("shard_size", "0GB"),
        ("shard_size", "2TB"),
        ("device", "null"),
    ],
)
def test_value_of_wrong_type_or_range_is_refused_with_its_field(tmp_path: Path, field: str, text: str) -> None:
    assert f"field '{field}'" in refusal(tmp_path, f"{field}: {text}\n")


@pytest.mark.parametrize(
    ("fields", "cures"),
    [
        ({"group_rows": 2}, ("refine_rounds to 0", "row_scale to false", "group_rows to 1")),
        ({"group_rows": "all", "refine_rounds": 0}, ("row_scale to false",)),
        ({"group_rows": "1/8", "row_scale": False}, ("refine_rounds to 0",)),
        ({"calibration": "none"}, ("bits in place of avg_bits", "sweep to none", "refine_rounds to 0")),
        ({"calibration": "none", "bits": 3, "refine_rounds": 0}, ("sweep to none",)),
        ({"calibration": "none", "bits": 3, "sweep": "none"}, ("refine_rounds to 0",)),
        ({"primitive": "shift1", "bits": 5}, ("2 to 4 bits",)),
        ({"primitive": "shift2", "avg_bits": 3.0}, ("bits in place of avg_bits", "primitive to bcq")),
        ({"primitive": "shift2", "bit_plan": "plan.json"}, ("bits in place of bit_plan",)),
    ],
)
def test_incompatible_fields_are_refused_with_the_cure(fields: dict[str, Any], cures: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.load("default", fields)
    message = str(caught.value)
    assert all(cure in message for cure in cures)
    assert all(f"`{name}`" in message for name in fields)


def test_suggested_cures_work() -> None:
    Recipe.load("default", {"group_rows": 2, "refine_rounds": 0, "row_scale": False})
    Recipe.load("default", {"calibration": "none", "bits": 3, "sweep": "none", "refine_rounds": 0})


def test_shift_primitive_replaces_the_average() -> None:
    recipe = Recipe.load("default", {"primitive": "shift2"})
    assert (recipe.avg_bits, recipe.bits) == (None, 3)


def test_candidates_are_sorted_and_unique(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("candidates: [4, 2, 3, 2]\n")
    assert Recipe.load(str(path)).candidates == (2, 3, 4)
    path.write_text("candidates: [shift2, 4, shift1-2, 2, shift2-4]\n")
    assert Recipe.load(str(path)).candidates == (2, 4, "shift1-2", "shift2-4")


def test_recipe_is_immutable() -> None:
    recipe = Recipe.load("equal-bits")
    with pytest.raises(ValidationError):
        recipe.bits = 2


def test_fingerprint_depends_on_every_field() -> None:
    others = {
        "primitive": "shift1",
        "bits": 2,
        "avg_bits": 2.5,
        "avg_file_bits": 3.5,
        "target_size": "55MB",
        "candidates": (2, 4),
        "tie_fused": False,
        "bit_plan": "plan.json",
        "group_size": 32,
        "group_rows": 1,
        "scale_format": "pot",
        "row_scale": not Recipe.load("equal-bits").row_scale,
        "offset": not Recipe.load("equal-bits").offset,
        "rotation": "none",
        "outlier_columns": 0.01,
        "fit": "greedy",
        "fit_rounds": 17,
        "weight_error": 0.5,
        "sweep": "none",
        "sweep_order": "natural",
        "refine_rounds": 17,
        "descent_passes": 17,
        "bias_correction": False,
        "true_sequential": False,
        "asymmetric": 1.0,
        "drift": 0.5,
        "loss_aware": 0.5,
        "reconstruct_epochs": 3,
        "distill_epochs": 2,
        "calibration": "ptb",
        "writing_length": 256,
        "writing_temperature": 0.8,
        "writing_min_p": 0.02,
        "samples": 1,
        "seq_len": 8,
        "batch_size": 1,
        "embedding_bits": 16,
        "skip": ("a",),
        "allow_partial": True,
        "seed": 1,
        "device": "cpu",
        "dtype": "float32",
        "shard_size": "1GB",
    }
    assert others.keys() == Recipe.model_fields.keys()
    base = Recipe.load("equal-bits")
    fingerprints = {recipe_of(**{name: value}).fingerprint() for name, value in others.items() if name != "group_rows"}
    fingerprints.add(recipe_of(row_scale=False, refine_rounds=0, group_rows=2).fingerprint())
    fingerprints.add(recipe_of(row_scale=False, refine_rounds=0, group_rows="all").fingerprint())
    assert len(fingerprints) == len(others) + 1
    assert base.fingerprint() not in fingerprints
    assert len(base.fingerprint()) == 64
    assert Recipe(**base.model_dump()).fingerprint() == base.fingerprint()


def test_fingerprint_ignores_excluded_fields() -> None:
    ours, other, more = recipe_of(), recipe_of(bits=2), recipe_of(bits=2, seed=1)
    assert ours.fingerprint(["bits"]) == other.fingerprint(["bits"]) != more.fingerprint(["bits"])
    assert ours.fingerprint(["bits"]) != ours.fingerprint()


@pytest.mark.parametrize(("text", "expected"), [("1KB", 1000), ("500MB", 500_000_000), ("2GB", 2_000_000_000)])
def test_shard_size_is_read_in_decimal_units(text: str, expected: int) -> None:
    assert recipe_of(shard_size=text).shard_bytes == expected


def test_every_field_is_described() -> None:
    for name, field in Recipe.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name
