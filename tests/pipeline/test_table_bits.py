"""Losses of embeddings and heads against divergences of transformers' own forward in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from formats import recipe_of
from tiny_models import save_tiny
from tiny_vision import save_tiny_vision
from torch import Tensor

from shiftadd_cli.allocation.divergence import probe_samples
from shiftadd_cli.bcq.choices import Choice
from shiftadd_cli.blockwise.forward import predict
from shiftadd_cli.blockwise.model import BlockwiseModel
from shiftadd_cli.calibration.table_inputs import table_moment
from shiftadd_cli.context import ALONE_ON_CPU
from shiftadd_cli.pipeline import table_bits
from shiftadd_cli.pipeline.table_bits import measure_tables
from shiftadd_cli.pipeline.tables import PlannedTable, encode_weight, place_weight, plan_tables
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.source import Source, find_structure, open_source

WINDOWS = torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(1))
CHOICES: tuple[Choice, ...] = (3, 8, "trellis1-4")


def prepared(path: Path, **fields: Any) -> tuple[BlockwiseModel, tuple[PlannedTable, ...], Recipe]:
    source = open_source(str(path), dtype="float32")
    structure = find_structure(source.skeleton())
    recipe = recipe_of(batch_size=2, **fields)
    return BlockwiseModel(source, structure), plan_tables(source.skeleton(), structure, recipe)[0], recipe


def costs_of(path: Path, samples: Tensor, *, every_form: bool) -> dict[str, dict[Choice, float]]:
    model, tables, recipe = prepared(path)
    with model.outside():
        return measure_tables(model, samples, tables, recipe, CHOICES, every_form=every_form)


def divergence(source: Source, samples: Tensor, name: str, weight: Tensor) -> float:
    """KL(original || model with this weight) in the whole model at once."""
    probes, model = probe_samples(samples), source.load_model(torch.float64)
    chances = []
    with torch.no_grad():
        for value in (model.get_parameter(name).clone(), weight.double()):
            model.get_parameter(name).copy_(value)
            chances.append(predict(model, probes).values.log_softmax(-1))
    original, changed = chances
    return float(((original - changed) * original.exp()).sum(-1).mean())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "opt", "vit"])
def test_every_form_is_measured_in_the_whole_model(tmp_path: Path, family: str) -> None:
    samples = WINDOWS
    if family == "vit":
        save_tiny_vision(family, tmp_path)
        samples = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    else:
        save_tiny(family, tmp_path)
    measured = costs_of(tmp_path, samples, every_form=True)
    model, tables, recipe = prepared(tmp_path, refine_rounds=0)
    assert set(measured) == {table.name for table in tables}
    for table in tables:
        for choice in CHOICES:
            with model.outside():
                moment = None if table.reader is None else table_moment(model, samples, 2, table.reader)
                form = table.at(choice, recipe)
                original = form.weight(model.skeleton)
                tensors, _ = encode_weight(form, original, recipe, moment, ALONE_ON_CPU)
                place_weight(form, model.skeleton, tensors)
                weight = model.skeleton.get_parameter(f"{table.name}.weight").detach().clone()
            expected = divergence(model.source, samples, f"{table.name}.weight", weight)
            assert measured[table.name][choice] == pytest.approx(1.9 * expected, rel=2e-2, abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_some_rows_in_one_form_tell_the_loss_of_all(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(family, tmp_path)
    monkeypatch.setattr(table_bits, "_REPLACED_ROWS", 100)
    monkeypatch.setattr(table_bits, "_COMPARED_ROWS", 60)
    exact, estimated = (costs_of(tmp_path, WINDOWS, every_form=every_form) for every_form in (True, False))
    for name, costs in exact.items():
        for choice in CHOICES:
            assert estimated[name][choice] == pytest.approx(costs[choice], rel=0.5)


def test_the_model_is_as_before(tmp_path: Path) -> None:
    save_tiny("qwen2", tmp_path)
    model, tables, recipe = prepared(tmp_path)
    with model.outside():
        before = model.skeleton.get_input_embeddings().weight.detach().clone()
        for _ in range(2):
            measure_tables(model, WINDOWS, tables, recipe, CHOICES, every_form=False)
            assert torch.equal(model.skeleton.get_input_embeddings().weight, before)
            assert model.skeleton.lm_head.weight is model.skeleton.get_input_embeddings().weight
