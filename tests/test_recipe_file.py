"""Recipes read from files, with overrides, and the message for every fault in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from formats import recipe_of
from recipe_faults import refusal

from shiftadd_cli.errors import RecipeError
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.recipe_file import MAX_BYTES, packaged_names


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("bits: 2\ngroup_size: 128\n")
    recipe = Recipe.load(str(path), {"bits": 4})
    assert (recipe.bits, recipe.group_size) == (4, 128)


def test_overrides_can_fix_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("group_rows: all\nrow_scale: false\n")
    with pytest.raises(RecipeError, match="refine_rounds to 0"):
        Recipe.load(str(path))
    assert Recipe.load(str(path), {"refine_rounds": 0}).group_rows == "all"


def test_packaged_name_wins_over_a_file_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fast").write_text("bits: 7\n")
    monkeypatch.chdir(tmp_path)
    assert Recipe.load("fast").bits == 3
    assert Recipe.load("./fast").bits == 7


def test_empty_file_is_the_default_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("# nothing yet\n")
    assert Recipe.load(str(path)) == Recipe.load("default")


def test_exponents_are_numbers_and_lists_are_tuples(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("weight_error: 1e-3\nskip: [lm_head, '*.k_proj']\n")
    recipe = Recipe.load(str(path))
    assert recipe.weight_error == 0.001
    assert recipe.skip == ("lm_head", "*.k_proj")


def test_unknown_field_is_refused_with_its_file_and_the_nearest_name(tmp_path: Path) -> None:
    message = refusal(tmp_path, "group-sise: 64\n")
    assert str(tmp_path / "mine.yaml") in message
    assert "'group-sise'" in message
    assert "did you mean 'group_size'?" in message


def test_unknown_field_without_a_near_match_gets_no_suggestion(tmp_path: Path) -> None:
    assert "did you mean" not in refusal(tmp_path, "zzzz: 1\n")


def test_bits_in_overrides_replace_other_bits_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("avg_bits: 2.5\n")
    assert Recipe.load(str(path)).avg_bits == 2.5
    plain = Recipe.load(str(path), {"bits": 4})
    assert (plain.bits, plain.avg_bits) == (4, None)
    path.write_text("bits: 2\nbit_plan: plan.json\n")
    averaged = Recipe.load(str(path), {"avg_bits": 3})
    assert (averaged.avg_bits, averaged.bit_plan) == (3.0, None)


def test_fault_of_an_override_names_the_option(tmp_path: Path) -> None:
    message = refusal(tmp_path, "bits: 3\n", group_size=0)
    assert message.startswith("Option `group_size`: 0 is not valid")


def test_all_faults_are_reported_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, "bits: 9\nfit: best\n")
    assert "'bits'" in message
    assert "'fit'" in message


@pytest.mark.parametrize(
    ("content", "excerpt"),
    [
        ("bits: 3\nbits: 4\n", "line 2, column 1: field 'bits' is given twice"),
        ("bits: [\n", "line 2"),
        ("- bits\n", "holds a list"),
        ("just words\n", "holds a str"),
        ("1: 2\n", "1 is not a field name"),
        ("? [a]\n: 1\n", "line 1"),
        ("a: &x [1]\nb: [*x, *x]\n", "aliases"),
        ("calibration: 2020-13-45\n", "month"),
        ("seed: !!python/object/apply:os.getcwd []\n", "line 1"),
        ("[" * 100_000, "nested too deeply"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"a: '\x01'", "not valid YAML"),
        ("#" * (MAX_BYTES + 1), "at most"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_malformed_file_is_refused_in_one_sentence(tmp_path: Path, content: str | bytes, excerpt: str) -> None:
    message = refusal(tmp_path, content)
    assert excerpt in message
    assert str(tmp_path / "mine.yaml") in message
    assert len(message) < 400


def test_long_values_are_shortened_in_the_message(tmp_path: Path) -> None:
    assert len(refusal(tmp_path, f"fit: {'x' * 5000}\n")) < 400


def test_unknown_recipe_is_refused_with_the_packaged_names(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'shiftaddllm-acc'") as caught:
        Recipe.load("shiftaddlm-acc")
    assert all(name in str(caught.value) for name in packaged_names())


def test_folder_and_unreadable_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="not a file"):
        Recipe.load(str(tmp_path))
    path = tmp_path / "mine.yaml"
    path.write_text("bits: 3\n")

    def forbidden(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", forbidden)
    with pytest.raises(RecipeError, match=r"mine.yaml cannot be read: Permission denied"):
        Recipe.load(str(path))


def test_recipe_survives_yaml(tmp_path: Path) -> None:
    recipe = recipe_of(bits=2, skip=("a", "b"), weight_error=1e-7)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert Recipe.load(str(path)) == recipe
