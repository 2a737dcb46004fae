from __future__ import annotations

from typing import Any

import click
import pytest
from click.testing import CliRunner

from shiftadd_cli.cli import main
from shiftadd_cli.cli.options import (
    default_text,
    option_name,
    overrides_from,
    recipe_choice,
    recipe_options,
    recipe_options_without,
)
from shiftadd_cli.recipe import Recipe

OTHER_VALUES: dict[str, tuple[list[str], Any]] = {
    "primitive": (["--primitive", "shift1"], "shift1"),
    "bits": (["--bits", "2"], 2),
    "avg_bits": (["--avg-bits", "2.5"], 2.5),
    "candidates": (["--candidates", "2,4, shift2-5"], (2, 4, "shift2-5")),
    "tie_fused": (["--no-tie-fused"], False),
    "bit_plan": (["--bit-plan", "plan.json"], "plan.json"),
    "group_size": (["--group-size", "128"], 128),
    "group_rows": (["--group-rows", "1/8"], "1/8"),
    "scale_format": (["--scale-format", "pot"], "pot"),
    "row_scale": (["--no-row-scale"], False),
    "offset": (["--offset"], True),
    "rotation": (["--rotation", "none"], "none"),
    "outlier_columns": (["--outlier-columns", "0.01"], 0.01),
    "fit": (["--fit", "greedy"], "greedy"),
    "fit_rounds": (["--fit-rounds", "7"], 7),
    "weight_error": (["--weight-error", "1e-3"], 0.001),
    "sweep": (["--sweep", "dynamic"], "dynamic"),
    "sweep_order": (["--sweep-order", "natural"], "natural"),
    "refine_rounds": (["--refine-rounds", "0"], 0),
    "descent_passes": (["--descent-passes", "5"], 5),
    "bias_correction": (["--no-bias-correction"], False),
    "true_sequential": (["--no-true-sequential"], False),
    "asymmetric": (["--asymmetric", "0.25"], 0.25),
    "loss_aware": (["--loss-aware", "1"], 1.0),
    "reconstruct_epochs": (["--reconstruct-epochs", "2"], 2),
    "distill_epochs": (["--distill-epochs", "2"], 2),
    "calibration": (["--calibration", "mine.txt"], "mine.txt"),
    "writing_length": (["--writing-length", "64"], 64),
    "writing_temperature": (["--writing-temperature", "0.9"], 0.9),
    "writing_min_p": (["--writing-min-p", "0.1"], 0.1),
    "samples": (["--samples", "4"], 4),
    "seq_len": (["--seq-len", "32"], 32),
    "batch_size": (["--batch-size", "1"], 1),
    "embedding_bits": (["--embedding-bits", "16"], 16),
    "skip": (["--skip", "lm_head", "--skip", "*.k_proj"], ("lm_head", "*.k_proj")),
    "allow_partial": (["--allow-partial"], True),
    "seed": (["--seed", "3"], 3),
    "device": (["--device", "cpu"], "cpu"),
    "dtype": (["--dtype", "float32"], "float32"),
    "shard_size": (["--shard-size", "100MB"], "100MB"),
}


def parse(arguments: list[str]) -> dict[str, Any]:
    seen: dict[str, Any] = {}

    @click.command()
    @recipe_choice
    @recipe_options
    def command(**options: Any) -> None:
        seen.update(overrides_from(options))
        seen["recipe given"] = options["recipe"]

    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    return seen


def options_of_an_empty_command() -> dict[str, click.Option]:
    @click.command()
    @recipe_options
    def command(**_: Any) -> None: ...

    return {option.name or "": option for option in command.params if isinstance(option, click.Option)}


def test_options_are_exactly_the_recipe_fields_in_their_order() -> None:
    options = options_of_an_empty_command()
    assert list(options) == list(Recipe.model_fields)
    for field, option in options.items():
        assert option.opts == [option_name(field)]


def test_fields_left_out_have_no_option() -> None:
    @click.command()
    @recipe_options_without("bits", "skip")
    def command(**_: Any) -> None: ...

    assert [option.name for option in command.params] == [
        name for name in Recipe.model_fields if name not in ("bits", "skip")
    ]


def test_quantize_offers_every_recipe_field_and_nothing_else_shapes_the_result() -> None:
    quantize = main.get_command(click.Context(main), "quantize")
    assert quantize is not None
    options = {option.name: option for option in quantize.params if isinstance(option, click.Option)}
    assert set(Recipe.model_fields) <= set(options)
    about_the_call = {"out", "recipe", "dry_run", "overwrite", "resume", "max_memory", "team_timeout"}
    about_the_call |= {"quiet", "verbose", "trust_remote_code"}
    assert set(options) - set(Recipe.model_fields) == about_the_call


def test_every_field_has_a_case_below() -> None:
    assert OTHER_VALUES.keys() == Recipe.model_fields.keys()


@pytest.mark.parametrize("field", OTHER_VALUES)
def test_option_reaches_its_field_with_the_right_type(field: str) -> None:
    arguments, expected = OTHER_VALUES[field]
    seen = parse(arguments)
    assert seen == {field: expected, "recipe given": "default"}
    assert type(seen[field]) is type(expected)
    together = {"group_rows": {"row_scale": False, "refine_rounds": 0}}.get(field, {})
    assert getattr(Recipe.load("default", {**together, field: seen[field]}), field) == expected


def test_options_not_given_leave_the_recipe_alone() -> None:
    assert parse(["--recipe", "fast"]) == {"recipe given": "fast"}


def test_switches_can_be_turned_both_ways() -> None:
    assert parse(["--row-scale", "--no-offset"]) == {"row_scale": True, "offset": False, "recipe given": "default"}


@pytest.mark.parametrize("arguments", [["--bits", "three"], ["--fit", "best"], ["--seed"]])
def test_ill_typed_option_is_a_usage_error(arguments: list[str]) -> None:
    @click.command()
    @recipe_options
    def command(**_: Any) -> None: ...

    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 2
    assert arguments[0] in result.stderr


def test_help_gives_description_and_default_of_every_field() -> None:
    options = options_of_an_empty_command()
    for name, field in Recipe.model_fields.items():
        text = options[name].help or ""
        assert text.startswith(field.description or "?")
        assert text.endswith(f"[default: {default_text(name)}]")


def test_defaults_are_those_of_the_default_recipe_as_they_would_be_typed() -> None:
    said = {name: default_text(name) for name in Recipe.model_fields}
    assert (said["avg_bits"], said["bits"], said["bit_plan"], said["skip"]) == ("3.25", "none", "none", "none")
    assert (said["row_scale"], said["offset"], said["candidates"], said["group_size"]) == (
        "on",
        "off",
        "2,3,4,5",
        "all",
    )
    numbers = {name: value for name, value in Recipe.load() if type(value) in (int, float) and name != "bits"}
    assert {name: type(value)(said[name]) for name, value in numbers.items()} == numbers
