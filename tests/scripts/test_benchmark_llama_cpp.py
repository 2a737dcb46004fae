"""The comparison with llama.cpp, with a script in place of its program."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from artifacts import write_checkpoint
from benchmark_llama_cpp import main
from click.testing import CliRunner
from tiny_models import tiny_model, tiny_tokenizer

ENTRIES = [{"n_gen": 0, "avg_ts": 640.0}, {"n_gen": 3, "avg_ts": 1.5}]


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A script that appends its arguments to a file and prints what llama-bench would print."""
    path = tmp_path / "llama-bench"
    path.write_text(
        f"#!{sys.executable}\nimport sys\n"
        f"open({str(tmp_path / 'calls')!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"
        f"print({json.dumps(json.dumps(ENTRIES))})\n"
    )
    path.chmod(0o755)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = write_checkpoint(tiny_model("llama"), tmp_path / "checkpoint").folder
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_both_take_turns_and_the_table_has_their_rates(program: Path, checkpoint: Path) -> None:
    options = ["--llama-bench", str(program), "--gguf", str(program.parent / "model.gguf"), "--threads", "1"]
    result = CliRunner().invoke(main, [str(checkpoint), *options, "--prompt", "5", "--new", "3", "--rounds", "2"])
    assert result.exit_code == 0, result.output
    calls = (program.parent / "calls").read_text().splitlines()
    assert len(calls) == 3, "one to warm up, and two rounds"
    assert all("-p 5 -n 3 -t 1" in call for call in calls)
    row = next(line for line in result.stdout.splitlines() if line.startswith("model.gguf"))
    assert "1.5 (1.5 - 1.5)" in row
    assert "640.0 (640.0 - 640.0)" in row


def test_failing_program_gives_an_error_of_one_line(program: Path, checkpoint: Path) -> None:
    program.write_text("#!/bin/sh\nexit 3\n")
    options = ["--llama-bench", str(program), "--gguf", str(program.parent / "model.gguf"), "--threads", "1"]
    result = CliRunner().invoke(main, [str(checkpoint), *options, "--prompt", "5", "--new", "3"])
    assert result.exit_code == 2
    assert "build llama-bench as this script says" in " ".join(result.stderr.split())
