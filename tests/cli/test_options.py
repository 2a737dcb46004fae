from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result
from remote_models import MARK, save_remote_model
from stopped_runs import counting_text

import shiftadd_cli
from shiftadd_cli.cli import VERBS, main
from shiftadd_cli.cli.options import (
    default_text,
    option_name,
    overrides_from,
    recipe_choice,
    recipe_options,
    recipe_options_without,
)
from shiftadd_cli.errors import ArtifactError
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.recipe_file import packaged_names

OTHER_VALUES: dict[str, tuple[list[str], Any]] = {
    "primitive": (["--primitive", "shift1"], "shift1"),
    "bits": (["--bits", "2"], 2),
    "avg_bits": (["--avg-bits", "2.5"], 2.5),
    "avg_file_bits": (["--avg-file-bits", "3.5"], 3.5),
    "target_size": (["--target-size", "55MB"], "55MB"),
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
    "drift": (["--drift", "0.25"], 0.25),
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
    "embedding_bits": (["--embedding-bits", "trellis1-4"], "trellis1-4"),
    "skip": (["--skip", "lm_head", "--skip", "*.k_proj"], ("lm_head", "*.k_proj")),
    "allow_partial": (["--allow-partial"], True),
    "seed": (["--seed", "3"], 3),
    "device": (["--device", "cpu"], "cpu"),
    "dtype": (["--dtype", "float32"], "float32"),
    "shard_size": (["--shard-size", "100MB"], "100MB"),
}


def parse(arguments: list[str]) -> dict[str, Any]:
    overrides: dict[str, Any] = {}

    @click.command()
    @recipe_choice
    @recipe_options
    def command(**options: Any) -> None:
        overrides.update(overrides_from(options))
        overrides["recipe given"] = options["recipe"]

    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    return overrides


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


def test_only_recipe_fields_affect_the_result_of_quantize() -> None:
    quantize = main.get_command(click.Context(main), "quantize")
    assert quantize is not None
    options = {option.name: option for option in quantize.params if isinstance(option, click.Option)}
    assert set(Recipe.model_fields) <= set(options)
    about_the_call = {"out", "recipe", "dry_run", "overwrite", "resume", "max_memory", "team_timeout"}
    about_the_call |= {"quiet", "verbose", "trust_remote_code"}
    assert set(options) - set(Recipe.model_fields) == about_the_call


def test_every_field_has_a_case() -> None:
    assert OTHER_VALUES.keys() == Recipe.model_fields.keys()


@pytest.mark.parametrize("field", OTHER_VALUES)
def test_option_reaches_its_field_with_the_right_type(field: str) -> None:
    arguments, expected = OTHER_VALUES[field]
    overrides = parse(arguments)
    assert overrides == {field: expected, "recipe given": "default"}
    assert type(overrides[field]) is type(expected)
    together = {"group_rows": {"row_scale": False, "refine_rounds": 0}}.get(field, {})
    assert getattr(Recipe.load("default", {**together, field: overrides[field]}), field) == expected


def test_absent_options_leave_the_recipe_alone() -> None:
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


def test_defaults_in_the_help_are_those_of_the_default_recipe() -> None:
    defaults = {name: default_text(name) for name in Recipe.model_fields}
    assert (defaults["avg_bits"], defaults["bits"], defaults["bit_plan"], defaults["skip"]) == (
        "3.4",
        "none",
        "none",
        "none",
    )
    assert (defaults["row_scale"], defaults["offset"], defaults["candidates"], defaults["group_size"]) == (
        "on",
        "off",
        "5,trellis1-1,trellis1-2,trellis1-3,trellis1-4",
        "all",
    )
    numbers = {name: value for name, value in Recipe.load() if type(value) in (int, float) and name != "bits"}
    assert {name: type(value)(defaults[name]) for name, value in numbers.items()} == numbers


def completions(*words: str) -> list[tuple[str, str]]:
    """Kinds and values of the completions in bash for the last of these words."""
    program = (
        "import sys\nfrom shiftadd_cli.cli import main\nmain(prog_name='shiftadd', complete_var='_SHIFTADD_COMPLETE')"
    )
    variables = {
        "_SHIFTADD_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(("shiftadd", *words)),
        "COMP_CWORD": str(len(words)),
    }
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", program],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "| torch" not in result.stderr
    kinds = (line.split(",", 1) for line in result.stdout.splitlines())
    return [(kind, value) for kind, value in kinds]


def test_verbs_complete() -> None:
    assert {value for _, value in completions("")} == set(VERBS)
    assert completions("qu") == [("plain", "quantize")]


def test_options_complete() -> None:
    assert ("plain", "--recipe") in completions("quantize", "demo", "--re")


@pytest.mark.parametrize("verb", ["quantize", "allocate-bits", "evaluate", "generate", "benchmark"])
def test_models_complete_to_the_demo_and_files(verb: str) -> None:
    assert completions(verb, "de") == [("plain", "demo"), ("file", "de")]


def test_recipes_complete_to_names_and_files() -> None:
    completed = completions("quantize", "demo", "--recipe", "shift")
    names = [name for name in packaged_names() if name.startswith("shift")]
    assert completed == [*(("plain", name) for name in names), ("file", "shift")]


TRUST = "--trust-remote-code"
QUICK = ("--samples", "4", "--seq-len", "16", "--batch-size", "2", "--group-size", "16")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model, a text, and the output of `quantize`."""
    folder = tmp_path_factory.mktemp("place")
    save_remote_model(folder / "model")
    counting_text(folder / "text.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        arguments = ["quantize", "model", "-o", "out", "--recipe", "equal-bits", "--calibration", "text.txt", *QUICK]
        assert CliRunner().invoke(main, [*arguments, TRUST]).exit_code == 0
    return folder


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ("quantize", "model", "-o", "new", "--recipe", "fast", "--calibration", "none"),
        ("allocate-bits", "model", "-o", "plan.json", "--avg-bits", "4", "--calibration", "text.txt", *QUICK),
        ("evaluate", "model", "--dataset", "text.txt", "--context", "16", "--max-tokens", "64"),
        ("evaluate", "out", "--dataset", "text.txt", "--context", "16", "--max-tokens", "64"),
        ("export", "out", "-o", "dense", "--format", "dense"),
        ("cost", "out"),
        ("report", "out"),
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_remote_code_runs_only_if_it_is_trusted(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("SHIFTADD_CACHE", str(workspace / "cache"))
    (workspace / MARK).unlink(missing_ok=True)
    refused = run(*arguments)
    assert refused.exit_code == 2
    assert f"runs only with {TRUST}." in refused.output
    assert not (workspace / MARK).exists()
    accepted = run(*arguments, TRUST)
    assert accepted.exit_code == 0, accepted.output


@pytest.mark.parametrize("verb", ["generate", "benchmark"])
def test_class_that_cannot_generate_is_refused_by_name(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.chdir(workspace)
    options = {
        "generate": ("--prompt", "1 is", "--max-new-tokens", "2", "--no-chat"),
        "benchmark": ("--no-layers", "--rounds", "1", "--prompt-tokens", "4", "--new-tokens", "2"),
    }
    refused = run(verb, "out", *options[verb], TRUST)
    assert refused.exit_code == 2
    assert "MyModel has no method `generate`, so it cannot generate text" in refused.output
    assert "runs only with" in run(verb, "out", *options[verb]).output


def test_code_is_copied_to_the_checkpoint_and_the_export(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    assert run("export", "out", "-o", "dense-too", "--format", "dense", TRUST).exit_code == 0
    for folder in ("out", "dense-too"):
        for name in ("configuration_mine.py", "modeling_mine.py", "tokenizer.json"):
            assert (workspace / folder / name).read_bytes() == (workspace / "model" / name).read_bytes()
    tokens = torch.arange(8)[None]
    packed = shiftadd_cli.load("out", trust_remote_code=True)(tokens).logits
    decoded = shiftadd_cli.load("out", trust_remote_code=True).dequantize()(tokens).logits
    torch.testing.assert_close(packed, decoded, rtol=1e-4, atol=1e-4)


def test_python_runs_no_untrusted_code(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    (workspace / MARK).unlink(missing_ok=True)
    with pytest.raises(ArtifactError, match="trust_remote_code=True"):
        shiftadd_cli.load("out")
    assert not (workspace / MARK).exists()


def test_model_with_its_own_code_cannot_be_exported_to_gguf(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    refused = run("export", "out", "-o", "gguf", "--format", "gguf", TRUST)
    assert refused.exit_code == 2
    assert "Models of type mine-alone cannot be exported to GGUF" in refused.output
    assert run("inspect", "out", "--verify").exit_code == 0
