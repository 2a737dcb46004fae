"""Moments of the inputs of heads and patch embeddings against float64 sums over a plain forward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, save_tiny
from tiny_vision import save_tiny_vision
from torch import Tensor, nn

from shiftadd_cli.blockwise.forward import run_model
from shiftadd_cli.blockwise.model import BlockwiseModel
from shiftadd_cli.calibration import hessian
from shiftadd_cli.calibration.table_inputs import table_moment
from shiftadd_cli.source import find_structure, open_source

WINDOWS = torch.randint(0, 256, (6, 16), generator=torch.Generator().manual_seed(1))


def moment_of(path: Path, samples: Tensor, name: str) -> Tensor | None:
    source = open_source(str(path))
    model = BlockwiseModel(source, find_structure(source.skeleton()))
    with model.outside():
        return table_moment(model, samples, 4, name)


def input_in_a_plain_pass(path: Path, samples: Tensor, name: str) -> Tensor:
    model = open_source(str(path)).load_model(torch.float32)
    seen: list[Tensor] = []
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    with torch.no_grad():
        run_model(model, samples)
    return seen[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_head_reads_what_it_reads_in_a_plain_pass(tmp_path: Path, family: str) -> None:
    save_tiny(family, tmp_path)
    rows = input_in_a_plain_pass(tmp_path, WINDOWS, "lm_head").flatten(0, 1)
    moment = moment_of(tmp_path, WINDOWS, "lm_head")
    assert moment is not None
    torch.testing.assert_close(moment.double(), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)


def test_every_so_many_windows_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama", tmp_path)
    monkeypatch.setattr(hessian, "_TOKENS", 32)
    monkeypatch.setattr(hessian, "_TOKENS_PER_INPUT", 0.5)
    some, those = moment_of(tmp_path, WINDOWS, "lm_head"), moment_of(tmp_path, WINDOWS[::3], "lm_head")
    assert some is not None
    assert those is not None
    assert torch.equal(some, those)


@pytest.mark.parametrize("family", ["vit", "dinov2"])
def test_convolution_reads_patches(tmp_path: Path, family: str) -> None:
    save_tiny_vision(family, tmp_path)
    structure = find_structure(open_source(str(tmp_path)).skeleton())
    name = next(name for name, reason in structure.kept if reason == "patch embedding")
    images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    pixels = input_in_a_plain_pass(tmp_path, images, name)
    squares = [pixels[:, :, y : y + 4, x : x + 4].flatten(1) for y in range(0, 16, 4) for x in range(0, 16, 4)]
    rows = torch.cat(squares)
    moment = moment_of(tmp_path, images, name)
    assert moment is not None
    torch.testing.assert_close(moment.double(), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["vit", "dinov2", "swin"])
def test_classifier_reads_one_vector_of_every_image(tmp_path: Path, family: str) -> None:
    save_tiny_vision(family, tmp_path)
    images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    rows = input_in_a_plain_pass(tmp_path, images, "classifier")
    assert len(rows) == len(images)
    moment = moment_of(tmp_path, images, "classifier")
    assert moment is not None
    torch.testing.assert_close(moment.double(), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{"groups": 3}, {"padding": 1, "padding_mode": "reflect"}, {"padding": "same"}])
def test_other_convolutions_have_no_moment(tmp_path: Path, changes: dict[str, int | str]) -> None:
    save_tiny_vision("vit", tmp_path)
    source = open_source(str(tmp_path))
    skeleton, structure = source.skeleton(), find_structure(source.skeleton())
    name = next(name for name, reason in structure.kept if reason == "patch embedding")
    parent = skeleton.get_submodule(name.rpartition(".")[0])
    other = nn.Conv2d(3, 33, 4, device="meta", **changes)  # type: ignore[arg-type]
    setattr(parent, name.rpartition(".")[2], other)
    assert table_moment(BlockwiseModel(source, structure), torch.zeros(2, 3, 16, 16), 2, name) is None
