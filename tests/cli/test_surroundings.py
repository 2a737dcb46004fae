"""Terminals, pipes, names and settings as they are out there: said before the work, or handled; never a traceback."""

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
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    save_tiny("llama", folder / "model")
    (folder / "模型é").symlink_to("model")
    counting_text(folder / "text.txt")
    return folder


def run(place: Path, *arguments: str | bytes, **settings: str | None) -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | {name: value for name, value in settings.items() if value is not None}
    for name, value in settings.items():
        if value is None:
            environment.pop(name, None)
    command = [sys.executable, "-m", "shiftadd_cli", *arguments]
    found = subprocess.run(command, cwd=place, env=environment, capture_output=True, timeout=120)
    assert b"Traceback" not in found.stderr, found.stderr.decode(errors="replace")
    return found


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_of_another_encoding_gets_the_result(place: Path, encoding: str) -> None:
    found = run(place, "evaluate", "模型é", *SCORE, "--json", PYTHONIOENCODING=encoding)
    assert found.returncode == 0, found.stderr.decode()
    text = found.stdout.decode("utf-8" if encoding == "ascii" else encoding.partition(":")[0])
    assert json.loads(text)["models"][0]["spec"] == "模型é"


@pytest.mark.parametrize(
    "arguments",
    [
        (b"evaluate", b"model\xff"),
        (b"quantize", b"model", b"-o", b"out\xff"),
        (b"quantize", b"model", b"-o", b"new", b"--calibration", b"text\xff.txt"),
    ],
)
def test_a_name_that_is_no_text_is_refused_before_the_work(place: Path, arguments: tuple[bytes, ...]) -> None:
    found = run(place, *arguments)
    assert found.returncode == 2
    (line,) = found.stderr.decode().splitlines()
    assert "is not valid utf-8 text; rename the file." in line
    assert "\\udcff" in line


def test_a_locale_that_cannot_name_the_file_is_told(place: Path) -> None:
    found = run(place, "evaluate", "模型é", LC_ALL="POSIX", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    assert found.returncode == 2
    assert b"set LC_ALL=C.UTF-8, or rename the file." in found.stderr


def test_python_writes_no_folder_whose_name_is_no_text(place: Path) -> None:
    """No library opens a weight file there."""
    with pytest.raises(OutputError, match=r"out\\udcfe is not valid utf-8 text"):
        shiftadd_cli.quantize(str(place / "model"), place / os.fsdecode(b"out\xfe"), "fast", group_size=16)


def test_a_pipe_that_is_closed_ends_the_output_and_no_more(place: Path) -> None:
    command = [sys.executable, "-m", "shiftadd_cli", "generate", "model", "--prompt", "1 is", "--max-new-tokens", "20"]
    process = subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    process.wait(timeout=120)
    process.stderr.close()
    assert b"Traceback" not in said
    assert b"Exception ignored" not in said


@pytest.mark.parametrize("closed", ["2>&-"])
def test_a_stream_that_is_closed_from_the_start_is_passed_over(place: Path, closed: str) -> None:
    command = [sys.executable, "-m", "shiftadd_cli", "quantize", "model", "-o", f"out{closed[0]}", "--recipe", "fast"]
    shell = ["bash", "-c", f'"$@" {closed}', "bash", *command, "--group-size", "16"]
    found = subprocess.run(shell, cwd=place, capture_output=True, timeout=120)
    assert found.returncode == 0, found.stderr.decode()
    assert (place / f"out{closed[0]}" / "report.json").is_file()


@pytest.mark.parametrize(
    ("name", "value"),
    [("HF_HUB_DOWNLOAD_TIMEOUT", "soon"), ("HF_HUB_ETAG_TIMEOUT", ""), ("HF_ENDPOINT", "http://[::bad")],
)
def test_settings_of_the_hub_that_are_no_numbers_are_refused(place: Path, name: str, value: str) -> None:
    found = run(place, "evaluate", "model", *SCORE, **{name: value})
    assert found.returncode == 2
    (line,) = found.stderr.decode().splitlines()
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
def test_a_run_needs_no_home_no_cache_and_no_hub(place: Path, tmp_path: Path, settings: dict[str, str | None]) -> None:
    plan = str(tmp_path / "plan.json")
    arguments = ["allocate-bits", "model", "-o", plan, "--avg-bits", "4.5", "--calibration", "text.txt", *QUICK]
    settings = {"SHIFTADD_CACHE": str(tmp_path / "cache")} | settings
    found = run(place, *arguments, **settings)
    assert found.returncode == 0, found.stderr.decode()
    assert Path(plan).is_file()
    warned = found.stderr.decode().count("Warning: sensitivities cannot be kept")
    assert warned == (settings["SHIFTADD_CACHE"] == "text.txt" or settings.get("HOME") == "~nosuchuser")


@pytest.mark.parametrize("address", ["nonsense", "http://127.0.0.1:9"])
def test_a_hub_that_cannot_be_asked_is_told_in_a_line(place: Path, address: str) -> None:
    found = run(place, "evaluate", "nobody/nothing", *SCORE, HF_ENDPOINT=address)
    assert found.returncode == 2
    assert b"Error: There is no folder nobody/nothing here" in found.stderr.splitlines()[-1]
