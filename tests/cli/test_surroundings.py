"""Unusual terminals, pipes, names and settings are handled, or refused before the work; never with a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from stopped_runs import counting_text
from tiny_models import save_tiny

import shiftadd_cli
from shiftadd_cli.errors import OutputError

QUICK = ["--samples", "4", "--seq-len", "16", "--batch-size", "2", "--group-size", "16"]
SCORE = ["--dataset", "text.txt", "--context", "16", "--max-tokens", "64"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    save_tiny("llama", folder / "model")
    (folder / "模型é").symlink_to("model")
    counting_text(folder / "text.txt")
    return folder


def run(workspace: Path, *arguments: str | bytes, **settings: str | None) -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | {name: value for name, value in settings.items() if value is not None}
    for name, value in settings.items():
        if value is None:
            environment.pop(name, None)
    command = [sys.executable, "-m", "shiftadd_cli", *arguments]
    result = subprocess.run(command, cwd=workspace, env=environment, capture_output=True, timeout=120)
    assert b"Traceback" not in result.stderr, result.stderr.decode(errors="replace")
    return result


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_terminal_of_another_encoding_gets_the_result(workspace: Path, encoding: str) -> None:
    result = run(workspace, "evaluate", "模型é", *SCORE, "--json", PYTHONIOENCODING=encoding)
    assert result.returncode == 0, result.stderr.decode()
    text = result.stdout.decode("utf-8" if encoding == "ascii" else encoding.partition(":")[0])
    assert json.loads(text)["models"][0]["spec"] == "模型é"


@pytest.mark.parametrize(
    "arguments",
    [
        (b"evaluate", b"model\xff"),
        (b"quantize", b"model", b"-o", b"out\xff"),
        (b"quantize", b"model", b"-o", b"new", b"--calibration", b"text\xff.txt"),
    ],
)
def test_undecodable_name_is_refused_before_the_work(workspace: Path, arguments: tuple[bytes, ...]) -> None:
    result = run(workspace, *arguments)
    assert result.returncode == 2
    (line,) = result.stderr.decode().splitlines()
    assert "is not valid utf-8 text; rename the file." in line
    assert "\\udcff" in line


def test_locale_that_cannot_name_the_file_is_reported(workspace: Path) -> None:
    result = run(workspace, "evaluate", "模型é", LC_ALL="POSIX", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    assert result.returncode == 2
    assert b"set LC_ALL=C.UTF-8, or rename the file." in result.stderr


def test_python_writes_no_folder_with_an_undecodable_name(workspace: Path) -> None:
    """Libraries cannot open a weight file there."""
    with pytest.raises(OutputError, match=r"out\\udcfe is not valid utf-8 text"):
        shiftadd_cli.quantize(str(workspace / "model"), workspace / os.fsdecode(b"out\xfe"), "fast", group_size=16)


def test_closed_pipe_ends_the_output_without_a_message(workspace: Path) -> None:
    command = [sys.executable, "-m", "shiftadd_cli", "generate", "model", "--prompt", "1 is", "--max-new-tokens", "20"]
    process = subprocess.Popen(command, cwd=workspace, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.wait(timeout=120)
    process.stderr.close()
    assert b"Traceback" not in errors
    assert b"Exception ignored" not in errors


@pytest.mark.parametrize("closed", ["2>&-"])
def test_stream_closed_from_the_start_is_ignored(workspace: Path, closed: str) -> None:
    command = [sys.executable, "-m", "shiftadd_cli", "quantize", "model", "-o", f"out{closed[0]}", "--recipe", "fast"]
    shell = ["bash", "-c", f'"$@" {closed}', "bash", *command, "--group-size", "16"]
    result = subprocess.run(shell, cwd=workspace, capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr.decode()
    assert (workspace / f"out{closed[0]}" / "report.json").is_file()


@pytest.mark.parametrize(
    ("name", "value"),
    [("HF_HUB_DOWNLOAD_TIMEOUT", "soon"), ("HF_HUB_ETAG_TIMEOUT", ""), ("HF_ENDPOINT", "http://[::bad")],
)
def test_invalid_settings_of_the_hub_are_refused(workspace: Path, name: str, value: str) -> None:
    result = run(workspace, "evaluate", "model", *SCORE, **{name: value})
    assert result.returncode == 2
    (line,) = result.stderr.decode().splitlines()
    assert line.startswith(f"Error: {name} is ")


@pytest.mark.parametrize(
    "settings",
    [
        {"HOME": "~nosuchuser", "SHIFTADD_CACHE": None},
        {"SHIFTADD_CACHE": "text.txt"},
        {"HF_HOME": "text.txt"},
    ],
    ids=str,
)
def test_run_needs_no_home_cache_or_hub(workspace: Path, tmp_path: Path, settings: dict[str, str | None]) -> None:
    plan = str(tmp_path / "plan.json")
    arguments = ["allocate-bits", "model", "-o", plan, "--avg-bits", "4.5", "--calibration", "text.txt", *QUICK]
    defaults: dict[str, str | None] = {"SHIFTADD_CACHE": str(tmp_path / "cache")}
    settings = defaults | settings
    result = run(workspace, *arguments, **settings)
    assert result.returncode == 0, result.stderr.decode()
    assert Path(plan).is_file()
    warnings = result.stderr.decode().count("Warning: sensitivities cannot be kept")
    assert warnings == (settings["SHIFTADD_CACHE"] == "text.txt" or settings.get("HOME") == "~nosuchuser")


@pytest.mark.parametrize("address", ["nonsense", "http://127.0.0.1:9"])
def test_unreachable_hub_is_reported_in_one_line(workspace: Path, address: str) -> None:
    result = run(workspace, "evaluate", "nobody/nothing", *SCORE, HF_ENDPOINT=address)
    assert result.returncode == 2
    assert b"Error: There is no folder nobody/nothing here" in result.stderr.splitlines()[-1]
