"""A checkpoint is loaded and compared before it gets its final name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import edit_tensors
from stopped_runs import counting_text
from tiny_models import save_tiny
from tiny_vision import save_tiny_vision

import shiftadd_cli
from shiftadd_cli.errors import NumericalError
from shiftadd_cli.pipeline import recorder
from shiftadd_cli.pipeline.final_check import check_checkpoint

QUICK: dict[str, Any] = {
    "recipe": "equal-bits", "samples": 4, "seq_len": 40, "batch_size": 2, "fit_rounds": 1, "refine_rounds": 1,
}  # fmt: skip
TOKENS = torch.randint(3, 256, (1, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    source, text = save_tiny("llama", folder / "source"), counting_text(folder / "text.txt")
    shiftadd_cli.quantize(source, folder / "out", calibration=str(text), **QUICK)
    return folder / "out"


def predictions(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return shiftadd_cli.load(folder).dequantize()(input_ids=TOKENS).logits


def test_checkpoint_predicts_what_its_decoded_weights_predict(checkpoint: Path) -> None:
    assert check_checkpoint(checkpoint, TOKENS, predictions(checkpoint)) < 1e-3


def test_other_predictions_are_refused(checkpoint: Path) -> None:
    with pytest.raises(NumericalError, match="predicts something else when it is loaded"):
        check_checkpoint(checkpoint, TOKENS, predictions(checkpoint).roll(1, 1))


def test_non_finite_predictions_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    expected = predictions(checkpoint)
    shutil.copytree(checkpoint, tmp_path / "broken")
    edit_tensors(tmp_path / "broken", {"model.norm.weight": torch.full((48,), torch.nan)})
    with pytest.raises(NumericalError, match="not finite when it is loaded"):
        check_checkpoint(tmp_path / "broken", TOKENS, expected)


@pytest.mark.parametrize(
    "fields", [{}, {"calibration": "none", "sweep": "none", "refine_rounds": 0}, {"distill_epochs": 1}], ids=str
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
def test_every_run_compares_its_checkpoint_with_its_tensors(
    tmp_path: Path, family: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = save_tiny_vision if family == "vit" else save_tiny
    source = save(family, tmp_path / "source")
    calibration = "builtin" if family == "vit" else str(counting_text(tmp_path / "text.txt"))
    differences: list[float] = []
    check = recorder.check_checkpoint
    monkeypatch.setattr(
        recorder, "check_checkpoint", lambda *arguments, **options: differences.append(check(*arguments, **options))
    )
    shiftadd_cli.quantize(source, tmp_path / "out", **(QUICK | {"calibration": calibration} | fields))
    # Kernels with 16-bit tables round.
    assert len(differences) == 1
    assert differences[0] < 5e-3


def test_checkpoint_with_wrong_predictions_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, text = save_tiny("llama", tmp_path / "source"), counting_text(tmp_path / "text.txt")
    check = recorder.check_checkpoint
    monkeypatch.setattr(
        recorder, "check_checkpoint", lambda folder, sample, expected, **_: check(folder, sample, -expected)
    )
    with pytest.raises(NumericalError, match="predicts something else"):
        shiftadd_cli.quantize(source, tmp_path / "out", calibration=str(text), **QUICK)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "text.txt"]
