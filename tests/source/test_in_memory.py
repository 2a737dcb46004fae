"""A model in memory is a folder for a while, and what fails meanwhile keeps its own words."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import tiny_model, tiny_tokenizer

from shiftadd_cli.source.in_memory import as_folder


def test_a_name_is_itself(tmp_path: Path) -> None:
    with as_folder("demo", None, tmp_path / "out") as spec:
        assert spec == "demo"
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_beside_the_output_and_goes(tmp_path: Path) -> None:
    with as_folder(tiny_model("llama"), tiny_tokenizer(), tmp_path / "deep" / "out") as spec:
        folder = Path(spec)
        assert folder.parent.parent == tmp_path
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert list(tmp_path.iterdir()) == []


def test_what_fails_while_it_is_used_is_not_said_of_the_folder(tmp_path: Path) -> None:
    failure = FileNotFoundError(2, "No such file or directory", "text.txt")
    with pytest.raises(FileNotFoundError) as raised, as_folder(tiny_model("llama"), None, tmp_path / "out"):
        raise failure
    assert raised.value is failure
    assert list(tmp_path.iterdir()) == []
