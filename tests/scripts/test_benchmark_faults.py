"""scripts/benchmark_faults.py: which artifacts count as equal."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from benchmark_faults import contents
from click.testing import CliRunner
from tiny_models import save_tiny

from shiftadd_cli.cli import main as shiftadd


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One model, quantized twice with the same options."""
    folder = tmp_path_factory.mktemp("artifacts")
    model, outs = save_tiny("llama", folder / "model"), (folder / "a", folder / "b")
    for out in outs:
        result = CliRunner().invoke(shiftadd, ["quantize", str(model), "-o", str(out), "--recipe", "rtn"])
        assert result.exit_code == 0, result.output
    return outs


def test_two_runs_of_one_command_are_equal(artifacts: tuple[Path, Path]) -> None:
    first, second = map(contents, artifacts)
    assert first == second
    assert {"model.safetensors", "report.json", "report.html", "README.md"} <= first.keys()


def test_changed_byte_and_missing_page_are_detected(artifacts: tuple[Path, Path], tmp_path: Path) -> None:
    expected, other = contents(artifacts[0]), shutil.copytree(artifacts[1], tmp_path / "other")
    weights = other / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert contents(other) != expected
    weights.write_bytes(content)
    assert contents(other) == expected
    (other / "report.html").unlink()
    assert contents(other) != expected
