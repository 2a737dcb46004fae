"""`shiftadd inspect` as a user runs it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from artifacts import COMMON, edit_config, write_checkpoint
from click.testing import CliRunner, Result
from formats import matrix_format
from tiny_models import tiny_model

from shiftadd_cli.cli import main


def inspect(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["inspect", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tiny_model("qwen2"), tmp_path / "out").folder


def test_table_and_totals_are_shown(folder: Path) -> None:
    result = inspect(folder)
    assert result.exit_code == 0
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert "Qwen2ForCausalLM, format version 1" in result.output
    # 84 x 32 at 3 bits in groups of 16: 3 + 3 · 8 / 16 + 16 / 32 bits.
    assert re.search(r"model\.layers\.\*\.mlp\.up_proj +2 +84 x 32 +3 +apot2 +5\.000 ", result.output)
    assert re.search(r"model\.embed_tokens\.weight +1 +320 x 32 +float32 +41\.0 kB", result.output)
    assert f"Files         {stored / 1000:.1f} kB" in result.output
    assert "Verified" not in result.output


def test_primitives_other_than_planes_are_named(tmp_path: Path) -> None:
    own = {
        "q_proj": matrix_format(2, primitive="trellis1"),
        "up_proj": matrix_format(4, primitive="shift2"),
    }
    result = inspect(write_checkpoint(tiny_model("qwen2"), tmp_path / "out", own=own).folder)
    assert re.search(r"q_proj +2 +32 x 32 +trellis1-2 +apot2 ", result.output)
    assert re.search(r"up_proj +2 +84 x 32 +shift2-4 +none ", result.output)


def test_embedding_tables_are_listed_separately(tmp_path: Path) -> None:
    folder = write_checkpoint(tiny_model("qwen2"), tmp_path / "rows", tables=True).folder
    result = inspect(folder, "--verify")
    assert re.search(r"model\.embed_tokens +320 x 32 +8-bit rows +8\.500 +10\.9 kB", result.output)
    assert "Embeddings    10.9 kB" in result.output
    assert "model.embed_tokens.weight" not in result.output
    document = json.loads(inspect(folder, "--json").output)
    sizes = {"rows": 320, "columns": 32, "stored_bytes": 320 * 34}
    assert document["tables"] == [{"name": "model.embed_tokens", **sizes, "bits": 8, "primitive": None}]
    assert document["table_bytes"] == 320 * 34
    in_planes = COMMON.replaced(primitive="trellis1", bits=4)
    result = inspect(write_checkpoint(tiny_model("qwen2"), tmp_path / "planes", tables=in_planes).folder, "--verify")
    assert re.search(r"model\.embed_tokens +320 x 32 +trellis1-4 +\d\.\d{3} ", result.output)


def test_layers_are_listed_one_by_one(folder: Path) -> None:
    result = inspect(folder, "--layers")
    assert "model.layers.1.mlp.up_proj" in result.output
    assert "*" not in result.output


def test_verify_compares_checksums(folder: Path) -> None:
    result = inspect(folder, "--verify")
    assert result.exit_code == 0
    assert "checksums as in report.json" in result.output
    (folder / "report.json").unlink()
    assert "no checksums to compare" in inspect(folder, "--verify").output


def test_json_has_the_size_and_whether_it_is_verified(folder: Path) -> None:
    document = json.loads(inspect(folder, "--json", "--verify").output)
    assert document["verified"] is True
    assert document["file_bytes"] == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert json.loads(inspect(folder, "--json").output)["verified"] is False


def test_damage_is_reported_in_one_line_and_exits_2(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert inspect(folder).exit_code == 0
    result = inspect(folder, "--verify")
    assert result.exit_code == 2
    assert result.output.startswith("Error: ")
    assert result.output.count("\n") == 1
    assert path.name in result.output


def test_other_folders_and_newer_formats_are_refused(folder: Path, tmp_path: Path) -> None:
    for path, message in ((tmp_path / "gone", "is not a folder"), (tmp_path, "has no config.json")):
        result = inspect(path)
        assert (result.exit_code, message in result.output) == (2, True)
    edit_config(folder, format_version=99)
    result = inspect(folder)
    assert (result.exit_code, "upgrade it" in result.output) == (2, True)
