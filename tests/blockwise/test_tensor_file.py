"""Tensors come back unchanged from a file without a name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shiftadd_cli.blockwise.tensor_file import TensorFile
from shiftadd_cli.errors import OutputError


def test_tensors_come_back_unchanged(tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.randn(3, 5).T,
        (0, "x"): torch.randn(2, 2, 2).bfloat16(),
        (1, "x"): torch.tensor([1, -1]),
        "number": torch.tensor(2.5),
        "nothing": torch.empty(0, 4),
    }
    with TensorFile(tmp_path) as file:
        for key, tensor in tensors.items():
            assert key not in file
            file[key] = tensor
        assert list(tmp_path.iterdir()) == [], "the file has no name"
        for key, tensor in reversed(tensors.items()):
            assert key in file
            assert file[key].dtype == tensor.dtype
            assert torch.equal(file[key], tensor)
        file["number"] = torch.tensor([1.0, 2.0])
        assert file["number"].tolist() == [1.0, 2.0]
        assert torch.equal(file["matrix"], tensors["matrix"])
        with pytest.raises(KeyError):
            file["other"]


def test_an_unusable_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="missing"):
        TensorFile(tmp_path / "missing")
