"""`shiftadd export` as a user runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
from artifacts import write_checkpoint
from click.testing import CliRunner, Result
from tiny_models import save_tiny, tiny_model, tiny_tokenizer

from shiftadd_cli.cli import main


def export(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["export", *map(str, arguments)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = write_checkpoint(tiny_model("llama"), tmp_path_factory.mktemp("export") / "packed")
    tiny_tokenizer().save_pretrained(checkpoint.folder)
    return checkpoint.folder


@pytest.mark.parametrize(
    ("options", "file"),
    [
        (["--format", "dense"], "model.safetensors"),
        (["--format", "dense", "--dtype", "bfloat16"], "model.safetensors"),
        (["--format", "gguf"], "packed-float16.gguf"),
        (["--format", "gguf", "--dtype", "q8_0"], "packed-q8_0.gguf"),
    ],
)
def test_requested_format_is_written(folder: Path, tmp_path: Path, options: list[str], file: str) -> None:
    result = export(folder, "-o", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / file).is_file()
    assert result.stdout.startswith("Written to ")


def test_faults_are_reported_in_one_line(folder: Path, tmp_path: Path) -> None:
    original = save_tiny("llama", tmp_path / "original")
    for arguments, part in (
        ((folder, "-o", tmp_path / "out", "--format", "dense", "--dtype", "q8_0"), "--format gguf"),
        ((original, "-o", tmp_path / "out", "--format", "dense"), "not compressed by shiftadd"),
        ((tmp_path / "absent", "-o", tmp_path / "out", "--format", "gguf"), "is not a folder"),
        ((folder, "-o", original, "--format", "dense"), "not empty"),
    ):
        result = export(*arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith("Error: ")
        assert result.stderr.count("\n") == 1
        assert part in result.stderr
    assert not (tmp_path / "out").exists()
