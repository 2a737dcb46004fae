from __future__ import annotations

import json
from pathlib import Path

import pytest
from artifacts import write_checkpoint
from tiny_models import FAMILIES, tiny_model
from torch import nn

from shiftadd_cli.allocation.cost_table import load_cost_table
from shiftadd_cli.artifact.folder import Artifact
from shiftadd_cli.artifact.shards import nbytes
from shiftadd_cli.report.cost import Cost, energy_table, model_cost
from shiftadd_cli.report.unit_costs import load_unit_costs
from shiftadd_cli.runtime.skeleton import artifact_skeleton


def cost_of(artifact: Artifact, batch: int = 1) -> Cost:
    skeleton = artifact_skeleton(artifact.folder)
    return model_cost(skeleton, artifact.format, artifact.tensors, load_unit_costs(), batch=batch)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tables", [False, True])
def test_parts_cover_every_stored_byte_and_every_weight_moves_once(tmp_path: Path, family: str, tables: bool) -> None:
    model = tiny_model(family)
    artifact = Artifact.open(write_checkpoint(model, tmp_path / "out", tables=tables).folder)
    result = cost_of(artifact)
    stored = sum(map(nbytes, artifact.tensors.values()))
    assert sum(result.parts.values()) == stored
    assert result.dense_bytes == 2 * sum(parameter.numel() for parameter in model.parameters())
    totals = {cost.way: cost for cost in result.model}
    # One row of an embedding is read, and also the whole table if it is the head too.
    head = model.get_output_embeddings().weight
    expected = result.dense_bytes
    for embedding in (module for module in model.modules() if isinstance(module, nn.Embedding)):
        expected += 2 * embedding.weight.shape[1] - (0 if embedding.weight is head else 2 * embedding.weight.numel())
    assert totals["fp16"].counts["dram_byte"] == expected
    saved = result.dense_bytes - expected
    assert (totals["look-ups"].counts["dram_byte"] < stored) == (saved > 0)


def test_larger_batch_shares_only_the_reads(tmp_path: Path) -> None:
    artifact = Artifact.open(write_checkpoint(tiny_model("llama"), tmp_path / "out").folder)
    for one, eight in zip(cost_of(artifact).layers, cost_of(artifact, 8).layers, strict=True):
        assert eight.dram == pytest.approx(one.dram / 8)
        assert (eight.arithmetic, eight.on_chip) == (one.arithmetic, one.on_chip)
        assert one.total == one.arithmetic + one.on_chip + one.dram


def test_energy_is_the_sum_of_the_priced_counts(tmp_path: Path) -> None:
    prices: dict[str, float] = {name: unit.picojoules for name, unit in load_unit_costs().operations.items()}
    for cost in cost_of(Artifact.open(write_checkpoint(tiny_model("qwen2"), tmp_path / "out").folder)).model:
        energy = sum(count * prices[name] for name, count in cost.counts.items())
        assert cost.total == pytest.approx(energy)


def test_allocation_reads_the_table_and_more_bits_cost_more(tmp_path: Path) -> None:
    artifact = Artifact.open(write_checkpoint(tiny_model("llama"), tmp_path / "out").folder)
    table = energy_table(artifact.layouts, load_unit_costs())
    path = tmp_path / "energy.json"
    path.write_text(json.dumps(table.model_dump(mode="json", exclude_none=True)))
    read = load_cost_table(path)
    assert (read.cost, read.unit) == ("energy", "nJ")
    stored = 0.0
    for name, layout in artifact.layouts.items():
        shape = (layout.grid.rows, layout.grid.columns)
        costs = [read.of(name, shape, bits) for bits in range(1, 9)]
        assert costs == sorted(set(costs))
        stored += read.of(name, shape, layout.bits)
    layers = {cost.way: cost.total for cost in cost_of(artifact).layers}
    assert 1000 * stored <= min(layers["additions"], layers["look-ups"]) * (1 + 1e-5)
