"""scripts/benchmark_faults.py: what it calls the same, and what not."""

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
    """One model, quantized twice by the same options."""
    folder = tmp_path_factory.mktemp("artifacts")
    model, outs = save_tiny("llama", folder / "model"), (folder / "a", folder / "b")
    for out in outs:
        done = CliRunner().invoke(shiftadd, ["quantize", str(model), "-o", str(out), "--recipe", "rtn"])
        assert done.exit_code == 0, done.output
    return outs


def test_two_runs_of_one_command_are_the_same(artifacts: tuple[Path, Path]) -> None:
    first, second = map(contents, artifacts)
    assert first == second
    assert {"model.safetensors", "report.json", "report.html", "README.md"} <= first.keys()


def test_a_changed_byte_and_a_missing_page_are_seen(artifacts: tuple[Path, Path], tmp_path: Path) -> None:
    whole, other = contents(artifacts[0]), shutil.copytree(artifacts[1], tmp_path / "other")
    weights = other / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert contents(other) != whole
    weights.write_bytes(content)
    assert contents(other) == whole
    (other / "report.html").unlink()
    assert contents(other) != whole
