"""Quantizing blocks: playing back finished parts changes only the time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_tiny
from tiny_vision import save_pictures, save_tiny_vision

import shiftadd_cli
from shiftadd_cli.blockwise.output_cache import OutputCache
from shiftadd_cli.pipeline import run as run_module

QUICK: dict[str, Any] = {
    "recipe": "equal-bits",
    "samples": 6,
    "seq_len": 16,
    "batch_size": 4,
    "group_size": 16,
    "fit_rounds": 1,
}


class Silent(OutputCache):
    """Records nothing, so that everything is computed."""

    def _note(self, *_: Any) -> None:
        return


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {}),
        ("llama", {"asymmetric": 0.0}),
        ("llama", {"dtype": "bfloat16"}),
        ("llama", {"reconstruct_epochs": 1}),
        ("gpt2", {}),
        ("opt", {"dtype": "bfloat16"}),
        ("phi", {}),
        ("mixtral", {}),
        ("swin", {}),
    ],
    ids=str,
)
def test_playback_gives_the_bytes_of_a_full_computation(
    family: str, fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family == "swin":
        source, fields = save_tiny_vision(family, tmp_path / "source"), {
            "calibration": str(save_pictures(tmp_path / "pictures", 6, layout="folders")), **fields
        }  # fmt: skip
    else:
        source = save_tiny(family, tmp_path / "source")
    played: list[str] = []
    original = OutputCache._noted

    def count(self: OutputCache, index: int, name: str) -> Any:
        played.append(name)
        return original(self, index, name)

    monkeypatch.setattr(OutputCache, "_noted", count)
    shiftadd_cli.quantize(str(source), tmp_path / "played", **QUICK | fields)
    assert played
    monkeypatch.setattr(run_module, "OutputCache", Silent)
    played.clear()
    shiftadd_cli.quantize(str(source), tmp_path / "computed", **QUICK | fields)
    assert played == []
    files = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("played", "computed"))
    assert len(set(files)) == 1
