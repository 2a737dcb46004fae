"""A model in memory becomes a temporary folder, and failures in the meantime keep their own message."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import tiny_model, tiny_tokenizer

from shiftadd_cli.source.in_memory import as_folder


def test_name_is_passed_through(tmp_path: Path) -> None:
    with as_folder("demo", None, tmp_path / "out") as spec:
        assert spec == "demo"
    assert list(tmp_path.iterdir()) == []


def test_folder_lies_beside_the_output_and_is_removed(tmp_path: Path) -> None:
    with as_folder(tiny_model("llama"), tiny_tokenizer(), tmp_path / "deep" / "out") as spec:
        folder = Path(spec)
        assert folder.parent.parent == tmp_path
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert list(tmp_path.iterdir()) == []


def test_failures_while_the_folder_is_used_pass_through(tmp_path: Path) -> None:
    failure = FileNotFoundError(2, "No such file or directory", "text.txt")
    with pytest.raises(FileNotFoundError) as raised, as_folder(tiny_model("llama"), None, tmp_path / "out"):
        raise failure
    assert raised.value is failure
    assert list(tmp_path.iterdir()) == []
