"""Bad input to `shiftadd quantize`: one line with the cure, exit code 2, nothing written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from bit_plans import plan_for
from click.testing import CliRunner, Result
from formats import recipe_of
from safetensors.torch import load_file
from tiny_models import save_tiny

from shiftadd_cli.cli import main
from shiftadd_cli.source import Source
from shiftadd_cli.source import model as source_model

QUICK = ["--samples", "4", "--seq-len", "32"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("source") / "model")


def quantize(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["quantize", *map(str, arguments)])


def assert_refused(result: Result, *parts: str) -> None:
    assert result.exit_code == 2, result.output
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("Error: ")
    assert "Traceback" not in result.output
    for part in parts:
        assert part in line


BAD_OPTIONS = [
    (["--bits", "9"], "bits"),
    (["--bits", "0"], "bits"),
    (["--group-size", "0"], "group-size"),
    (["--group-size", "-3"], "group-size"),
    (["--recipe", "defualt"], "defualt"),
    (["--calibration", "none"], "fast"),
    (["--calibration", "no-such-text.txt"], "no-such-text.txt"),
    (["--skip", "*.no_such_module"], "no_such_module"),
    (["--device", "warp:9"], "--device"),
    (["--calibration", "builtin", "--samples", "100000000"], "tokens"),
    (["--samples", "100000000"], "free"),
    (["--calibration", "self:0.5,builtin"], "has no share"),
    (["--calibration", "self:0.5,no-such-text.txt:0.5"], "no-such-text.txt"),
    (["--calibration", "selfie"], "did you mean self?"),
    (["--writing-temperature", "0"], "writing-temperature"),
    (["--writing-min-p", "1"], "writing-min-p"),
]


@pytest.mark.parametrize(("options", "part"), BAD_OPTIONS)
def test_bad_options_are_refused(model: Path, tmp_path: Path, options: list[str], part: str) -> None:
    assert_refused(quantize(model, "-o", tmp_path / "out", *options), part)
    assert not list(tmp_path.iterdir())


def test_unknown_recipe_field_is_refused_with_its_file_and_the_nearest_field(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("bitz: 3\n")
    assert_refused(quantize(model, "-o", tmp_path / "out", "--recipe", recipe), "mine.yaml", "bitz", "bits")


@pytest.mark.parametrize("name", ["no/such/model", "no-such-folder/", "missing.gguf"])
def test_missing_model_is_refused(tmp_path: Path, name: str) -> None:
    assert_refused(quantize(name, "-o", tmp_path / "out"), name.rstrip("/"))
    assert not list(tmp_path.iterdir())


def test_folder_without_configuration_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert_refused(quantize(empty, "-o", tmp_path / "out"), "config.json")


def test_truncated_checkpoint_is_refused(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert_refused(quantize(broken, "-o", tmp_path / "out", *QUICK), "model.safetensors")
    assert not (tmp_path / "out").exists()


def test_artifact_is_refused_as_a_source(model: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "done"
    assert quantize(model, "-o", artifact, "--recipe", "fast").exit_code == 0
    assert_refused(quantize(artifact, "-o", tmp_path / "again"), "already")


def test_short_text_is_refused_with_the_required_tokens(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("just a few words")
    assert_refused(quantize(model, "-o", tmp_path / "out", "--calibration", text), "tokens", "65536")
    assert not (tmp_path / "out").exists()


def test_dataset_without_network_is_refused_with_the_cure(model: Path, tmp_path: Path) -> None:
    assert_refused(quantize(model, "-o", tmp_path / "out", "--calibration", "wikitext2"), "wikitext2", ".txt")


def test_existing_output_needs_overwrite(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert quantize(model, "-o", out, "--recipe", "fast").exit_code == 0
    before = (out / "config.json").read_bytes()
    assert_refused(quantize(model, "-o", out, "--recipe", "fast"), "--overwrite")
    assert (out / "config.json").read_bytes() == before
    assert quantize(model, "-o", out, "--recipe", "fast", "--bits", "2", "--overwrite").exit_code == 0
    assert json.loads((out / "config.json").read_text())["quantization_config"]["bits"] == 2


def test_overwrite_never_deletes_foreign_files(model: Path, tmp_path: Path) -> None:
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "thesis.txt").write_text("four years")
    assert_refused(quantize(model, "-o", precious, "--recipe", "fast", "--overwrite"), "not written by shiftadd")
    assert (precious / "thesis.txt").read_text() == "four years"


def test_output_inside_the_model_is_refused(model: Path) -> None:
    assert_refused(quantize(model, "-o", model / "out", "--recipe", "fast"), "inside")
    assert not (model / "out").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="the root user may write anywhere")
def test_folder_that_the_system_protects_is_refused(model: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert_refused(quantize(model, "-o", locked / "out", "--recipe", "fast"), "permission")


def test_folder_without_write_permission_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert_refused(quantize(model, "-o", tmp_path / "out", "--recipe", "fast"), "permission")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("after", "resumable"), [(0, False), (3, False), (50, True)])
def test_full_disk_is_reported_and_the_run_can_be_repeated(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, resumable: bool
) -> None:
    """Writing fails with the system's error for a full disk, at the start and in the middle of the work."""
    from shiftadd_cli.storage import durable

    written = []
    plain = durable.write_all

    def fill_up(file: BinaryIO, data: memoryview) -> None:
        written.append(len(data))
        if len(written) > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(durable, "write_all", fill_up)
        result = quantize(model, "-o", tmp_path / "out", "--recipe", "fast")
    assert_refused(result, "space", "the same command continues" if resumable else "Nothing was finished")
    assert [path.name for path in tmp_path.iterdir()] == ([".out.partial"] if resumable else [])
    assert quantize(model, "-o", tmp_path / "out", "--recipe", "fast").exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_bit_plan_of_another_model_or_format_is_refused(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(plan_for(save_tiny("llama", tmp_path / "other", seed=1), recipe_of(group_size=16)).to_json())
    assert_refused(quantize(model, "-o", tmp_path / "out", "--bit-plan", path), "another model")
    path.write_text(plan_for(model, recipe_of(group_size=16)).to_json())
    assert_refused(
        quantize(model, "-o", tmp_path / "out", "--recipe", "equal-bits", "--bit-plan", path), "group_size", "16", "128"
    )
    assert_refused(quantize(model, "-o", tmp_path / "out", "--bit-plan", tmp_path / "lost.json"), "allocate-bits")
    assert not (tmp_path / "out").exists()


def test_dry_run_shows_the_bits_of_a_plan(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(plan_for(model, recipe_of(group_size=16)).to_json())
    result = quantize(
        model, "-o", tmp_path / "out", "--recipe", "equal-bits", "--bit-plan", path, "--group-size", "16", "--dry-run"
    )
    assert result.exit_code == 0
    assert "2-4" in result.output
    assert "without scales" in result.output


def test_bits_of_layers_are_allocated_in_the_same_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is that of `allocate-bits` and then `quantize --bit-plan`, to the byte."""
    monkeypatch.setenv("SHIFTADD_CACHE", str(tmp_path / "cache"))
    quick = ("--group-size", "16", "--samples", "4", "--seq-len", "24", "--calibration", "builtin")
    one = quantize(model, "-o", tmp_path / "one", "--avg-bits", "4", *quick)
    assert one.exit_code == 0
    assert one.output.count("self_attn.q_proj") == 3, "the plan before and after the choice, and the summary"
    assert "at most 4 bits per weight, assigned" in one.output
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    assert report["size"]["bits_per_weight"] <= 4
    assert report["seconds"]["allocate"] > 0
    assert len({layer["bits"] for layer in report["layers"]}) > 1
    plan = tmp_path / "plan.json"
    allocated = CliRunner().invoke(main, ["allocate-bits", str(model), "-o", str(plan), "--avg-bits", "4", *quick])
    assert allocated.exit_code == 0
    assert quantize(model, "-o", tmp_path / "two", "--bit-plan", plan, *quick).exit_code == 0
    name = "model.safetensors"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_unreachable_average_is_refused_before_any_work(model: Path, tmp_path: Path) -> None:
    assert_refused(quantize(model, "-o", tmp_path / "out", "--avg-bits", "1.5"), "1.5", "cannot be met")
    assert not list(tmp_path.iterdir())


def test_dry_run_of_an_average_shows_the_least_size(model: Path, tmp_path: Path) -> None:
    result = quantize(model, "-o", tmp_path / "out", "--avg-bits", "8", "--group-size", "16", "--dry-run")
    assert result.exit_code == 0
    assert "the table shows the fewest bits" in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("able", [True, False])
def test_dtype_without_instructions_is_computed_in_float32_but_stored(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, able: bool
) -> None:
    monkeypatch.setattr(source_model, "computes_in", lambda _, dtype: able or dtype == torch.float32)
    result = quantize(model, "-o", tmp_path / "out", "--dtype", "bfloat16", *QUICK)
    assert result.exit_code == 0, result.output
    assert ("Computed      in float32, since this processor has no instructions for bfloat16" in result.stderr) is not (
        able
    )
    norm = load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"]
    assert norm.dtype == torch.bfloat16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    computed = json.loads((tmp_path / "out" / "report.json").read_text())["machine"]["dtype"]
    assert computed == ("bfloat16" if able else "float32")


def test_dry_run_shows_the_plan_and_writes_nothing(model: Path, tmp_path: Path) -> None:
    result = quantize(model, "-o", tmp_path / "out", "--dry-run")
    assert result.exit_code == 0
    assert "self_attn.q_proj" in result.output
    assert not list(tmp_path.iterdir())


def test_dry_run_does_not_load_the_model(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Source, "load_model", lambda *_: pytest.fail("a model was loaded"))
    result = quantize(model, "-o", tmp_path / "out", "--dry-run", *QUICK)
    assert result.exit_code == 0
    assert "Calibration   self, 4 x 32 tokens" in result.stdout


def test_summary_names_calibration_size_and_folder(model: Path, tmp_path: Path) -> None:
    result = quantize(model, "-o", tmp_path / "out", *QUICK)
    assert result.exit_code == 0
    for part in (
        "self (documents and conversations",
        "4 x 32 tokens",
        "Bits/weight",
        "Peak memory",
        str(tmp_path / "out"),
    ):
        assert part in result.stdout


def test_run_beyond_the_allowed_memory_is_refused_with_the_cure(model: Path, tmp_path: Path) -> None:
    options = (model, "-o", tmp_path / "out", "--recipe", "fast")
    refused = quantize(*options, "--max-memory", "10MB")
    assert_refused(refused, "--max-memory allows 10MB", "the minimum is")
    assert not list(tmp_path.iterdir())
    assert_refused(quantize(*options, "--max-memory", "plenty"), "800MB")
    assert quantize(*options, "--max-memory", "8GB").exit_code == 0
    endless = save_tiny("bloom", tmp_path / "bloom")
    longer = quantize(endless, "-o", tmp_path / "more", "--bits", "3", "--seq-len", "400000", "--max-memory", "6GB")
    assert_refused(longer, "give --batch-size")
