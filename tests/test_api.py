"""The Python interface does what the command line does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny

import shiftadd_cli

QUICK = {"samples": 4, "seq_len": 32, "group_size": 16}


def test_quantize_load_evaluate(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    report = shiftadd_cli.quantize(str(source), tmp_path / "out", bits=2, **QUICK)
    assert {layer.bits for layer in report.layers} == {2}
    model = shiftadd_cli.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=torch.tensor([[1, 2, 3]])).logits).all()
    result = shiftadd_cli.evaluate(
        [str(tmp_path / "out")], against=str(source), context=32, max_tokens=256, show_progress=False
    )
    row = result.to_dict()["models"][0]
    assert row["kl"] > 0


def test_a_recipe_object_and_fields_on_top_of_it(tmp_path: Path) -> None:
    source = save_tiny("gpt2", tmp_path / "source")
    recipe = shiftadd_cli.Recipe.load("fast", {"group_size": 12})
    report = shiftadd_cli.quantize(str(source), tmp_path / "out", recipe, bits=4)
    assert (report.recipe["group_size"], report.recipe["bits"], report.calibration) == (12, 4, None)


def test_errors_are_of_one_family(tmp_path: Path) -> None:
    with pytest.raises(shiftadd_cli.ShiftaddError, match="nowhere"):
        shiftadd_cli.quantize(str(tmp_path / "nowhere"), tmp_path / "out")


def test_importing_the_package_imports_no_torch() -> None:
    import subprocess
    import sys

    program = "import sys, shiftadd_cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
