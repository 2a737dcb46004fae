"""Names of methods, and the recipes they stand for."""

from __future__ import annotations

import importlib.util

import pytest
from experiments.quality.methods import Method, parse_methods, rows_of, split_names
from experiments.quality.peers import PEERS

from shiftadd_cli.errors import RecipeError
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.recipe_file import packaged_names

COMMON = {"calibration": "wikitext2", "samples": 7, "seq_len": 99, "seed": 5}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("default", ["default"]),
        ("default,gptq", ["default", "gptq"]),
        (" default , gptq,", ["default", "gptq"]),
        ("default:group_size=128,offset=false,gptq", ["default:group_size=128,offset=false", "gptq"]),
        ("default:a=1, b=2,peer:hqq:c=3", ["default:a=1,b=2", "peer:hqq:c=3"]),
        ("./mine.yaml,default", ["./mine.yaml", "default"]),
        ("", []),
    ],
)
def test_commas_separate_methods_and_changes(text: str, expected: list[str]) -> None:
    assert split_names(text) == expected


@pytest.mark.parametrize("name", packaged_names())
def test_packaged_recipe_is_a_method(name: str) -> None:
    (method,) = parse_methods([name])
    packaged = Recipe.load(name)
    shared = {**COMMON, "calibration": "none"} if packaged.calibration == "none" else COMMON
    # Bits on the command line replace an average.
    assert method.resolve(4, COMMON) == packaged.model_copy(update={**shared, "bits": 4, "avg_bits": None})


def test_method_with_an_average_has_a_row_only_at_the_width_below_it() -> None:
    (method, plain) = parse_methods(["best:avg_bits=2.25,reconstruct_epochs=0,best"])
    assert rows_of([method, plain], (2, 3)) == [(method, 2), (plain, 2), (plain, 3)]
    with pytest.raises(RecipeError, match=r"avg_bits=2\.25.* other --bits than 3, 4"):
        rows_of([plain, method], (3, 4))
    assert method.resolve(2, COMMON).avg_bits == 2.25
    assert plain.resolve(2, COMMON).avg_bits is None


@pytest.mark.parametrize(("field", "value"), [("avg_file_bits", 3.5), ("target_size", "50MB")])
def test_budget_of_the_file_replaces_the_shared_width(field: str, value: float | str) -> None:
    (method,) = parse_methods([f"default:{field}={value}"])
    recipe = method.resolve(3, COMMON)
    assert (recipe.way, getattr(recipe, field)) == (field, value)


def test_changes_override_shared_settings() -> None:
    (method,) = parse_methods(["default:group_size=all,offset=false,weight_error=1e-3,samples=3,skip=*.k_proj"])
    recipe = method.resolve(2, COMMON)
    assert (recipe.group_size, recipe.offset, recipe.weight_error, recipe.samples) == ("all", False, 1e-3, 3)
    assert (recipe.skip, recipe.bits, recipe.seq_len) == (("*.k_proj",), 2, COMMON["seq_len"])


def test_method_named_twice_counts_once() -> None:
    assert [method.label for method in parse_methods(["gptq,default", "gptq"])] == ["gptq", "default"]


def test_conflicting_fields_name_the_method() -> None:
    with pytest.raises(RecipeError, match=r"^Method default:group_rows=all: .*refine_rounds to 0"):
        parse_methods(["default:group_rows=all"])


def test_missing_peer_gives_one_sentence_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"^The peer 'hqq' needs the package hqq, .*pip install hqq") as caught:
        parse_methods(["peer:hqq"])
    assert "\n" not in str(caught.value)


def test_peer_accepts_only_fields_that_it_supports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    (method,) = parse_methods(["peer:quanto:group_size=32"])
    assert isinstance(method, Method)
    assert method.peer is PEERS["quanto"]
    assert method.resolve(4, COMMON).group_size == 32
    with pytest.raises(RecipeError, match="not offset"):
        parse_methods(["peer:quanto:offset=false"])


def test_shift_layers_are_a_method() -> None:
    (method,) = parse_methods(["default:primitive=shift1"])
    assert method.resolve(4, COMMON).primitive == "shift1"
    with pytest.raises(RecipeError, match="2 to 4 bits, not 5"):
        method.resolve(5, COMMON)
