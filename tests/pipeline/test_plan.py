"""A plan promises what the artifact will hold."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from formats import recipe_of
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny

from shiftadd_cli.artifact.format import ArtifactFormat
from shiftadd_cli.cli.describe import describe_plan
from shiftadd_cli.distributed.team import ALONE, Team
from shiftadd_cli.errors import RecipeError, SourceError
from shiftadd_cli.pipeline.plan import Plan, least_memory, make_plan
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.sizes import size
from shiftadd_cli.source import open_source


def plan_of(path: Path, **fields: Any) -> Plan:
    return make_plan(open_source(str(path)), Recipe.load("equal-bits", fields))


def test_planning_reads_no_weights(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    plan = plan_of(tmp_path)
    describe_plan(plan)
    assert all(parameter.is_meta for parameter in plan.source.skeleton().parameters())


@pytest.mark.parametrize("embedding_bits", [8, 16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_every_parameter_is_planned_once(tmp_path: Path, family: str, embedding_bits: int) -> None:
    save_tiny(family, tmp_path)
    plan = plan_of(tmp_path, embedding_bits=embedding_bits)
    assert (embedding_bits == 8) == bool(plan.tables)
    weights = sum(torch.Size(plan.tensors[name][0]).numel() for name in plan.kept)
    persistent = dict(plan.source.skeleton().named_buffers())
    buffers = sum(persistent[name].numel() for name in plan.kept if name in persistent)
    tables = sum(math.prod(table.shape) for table in plan.tables)
    assert plan.quantized_weights + tables + weights - buffers == plan.parameters


def test_sizes_match_the_planned_tensors(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    plan = plan_of(tmp_path, bits=2)
    assert plan.table_bytes == 2 * 320 * (48 + 2)
    stored = sum(torch.Size(s).numel() * d.itemsize for s, d in plan.tensors.values())
    assert plan.quantized_bytes + plan.table_bytes + plan.kept_bytes == stored
    assert plan.bits_per_weight == pytest.approx(8 * plan.quantized_bytes / plan.quantized_weights)


def test_bits_per_layer_reach_layouts_and_format(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    names = [linear.spec.name for linear in plan_of(tmp_path).linears]
    bits = {name: 2 if "mlp" in name else 4 for name in names}
    plan = make_plan(open_source(str(tmp_path)), Recipe.load("equal-bits", {}), bits)
    assert {linear.spec.name: linear.layout.bits for linear in plan.linears} == bits
    parsed = ArtifactFormat.from_dict(plan.artifact_format().to_dict())
    assert parsed.modules == {linear.spec.name: linear.layout for linear in plan.linears}
    weights = {linear.spec.name: linear.spec.out_features * linear.spec.in_features for linear in plan.linears}
    assert plan.planes_per_weight == sum(bits[name] * weights[name] for name in names) / sum(weights.values())
    assert "2-4" not in describe_plan(plan)
    bits[names[0]] = 3
    described = describe_plan(make_plan(open_source(str(tmp_path)), Recipe.load("equal-bits", {}), bits))
    assert "3-4" in described


def test_skipped_layers_are_kept(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    plan = plan_of(tmp_path, skip=("*.mlp.*",))
    assert all("mlp" not in linear.spec.name for linear in plan.linears)
    assert any(name.endswith("mlp.down_proj.weight") for name in plan.kept)


def test_skipping_everything_is_refused(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    with pytest.raises(SourceError, match="skip"):
        plan_of(tmp_path, skip=("*",))


@pytest.mark.parametrize(("asymmetric", "versions"), [(0.0, 1), (0.5, 2)])
def test_hidden_states_take_disk_space_but_no_memory(tmp_path: Path, asymmetric: float, versions: int) -> None:
    save_tiny("llama", tmp_path)
    few, many = (
        plan_of(tmp_path, samples=samples, asymmetric=asymmetric, calibration="builtin") for samples in (8, 800)
    )
    assert many.peak_memory_bytes - few.peak_memory_bytes < 1e6
    specs = [linear.spec for linear in many.linears if linear.spec.block == 0]
    waiting = sum(spec.out_features + (spec.in_features if asymmetric else 0) for spec in specs)
    assert many.state_bytes - few.state_bytes == (2 * versions * 48 + waiting) * 792 * 512 * 4
    at_once = [
        plan_of(tmp_path, samples=samples, asymmetric=0.0, true_sequential=False).state_bytes for samples in (8, 800)
    ]
    assert at_once[1] - at_once[0] == 2 * 48 * 792 * 512 * 4
    assert plan_of(tmp_path, calibration="none", sweep="none", refine_rounds=0).state_bytes == 0


def test_all_processes_but_the_first_hold_the_hidden_states_of_their_samples(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    plan = plan_of(tmp_path, samples=32, seq_len=64, batch_size=4, asymmetric=0.0)
    second = Team()
    second.rank, second.size = 1, 2
    assert plan.held_bytes(ALONE) == 0
    assert plan.held_bytes(second) == 16 * 64 * 48 * 4
    assert plan_of(tmp_path, calibration="none", sweep="none", refine_rounds=0).held_bytes(second) == 0


def test_undecided_bits_give_an_upper_limit_on_the_size(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    plan = plan_of(tmp_path, avg_bits=6.0)
    other = plan.file_bytes - plan.quantized_bytes
    assert plan.bits_per_weight < 6
    assert 8 * (plan.most_bytes - other) / plan.quantized_weights == pytest.approx(6, rel=1e-3)
    assert f"-> at most {size(plan.most_bytes)}, " in describe_plan(plan)
    settled = plan_of(tmp_path, bits=3)
    assert settled.most_bytes == settled.file_bytes
    assert "at most" not in describe_plan(settled)


@pytest.mark.parametrize(("fields", "copies"), [({"avg_bits": 4.0}, 1), ({"loss_aware": 1.0}, 2)], ids=str)
def test_options_with_gradients_hold_hidden_states_in_memory(
    tmp_path: Path, fields: dict[str, float], copies: int
) -> None:
    """All windows are held at the first block. Some of them, or all, are held at every block for the gradients."""
    save_tiny("llama", tmp_path)
    few, many = (plan_of(tmp_path, samples=samples, **fields) for samples in (8, 800))
    assert many.peak_memory_bytes - few.peak_memory_bytes > copies * 792 * 512 * 48 * 4


def test_least_memory_uses_the_largest_batch_that_fits(tmp_path: Path) -> None:
    save_tiny("bloom", tmp_path)  # has no limit on positions
    plans = {size: plan_of(tmp_path, batch_size=size, seq_len=4096, calibration="builtin") for size in (1, 2, 4, 16)}
    needs = {size: plan.peak_memory_bytes for size, plan in plans.items()}
    assert needs[1] < needs[2] < needs[4] < needs[16]
    size, least = least_memory(plans[16], needs[4] + 10**6)
    assert (size, least) == (4, pytest.approx(needs[4], rel=0.02))
    assert least_memory(plans[16], 0)[0] == 1
    assert least_memory(plans[16], needs[16]) == (16, needs[16])


@pytest.mark.parametrize("before", [(), ("<|user|>",)])
def test_description_names_the_window_start(tmp_path: Path, before: tuple[str, ...]) -> None:
    save_tiny("llama", tmp_path, before=before)
    assert f"; windows begin with {'<|user|>' if before else 'no special token'}" in describe_plan(plan_of(tmp_path))
    assert plan_of(tmp_path, calibration="none", sweep="none", refine_rounds=0).window_start is None


def test_default_windows_are_no_longer_than_the_positions(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"max_position_embeddings": 512', '"max_position_embeddings": 100'))
    model = str(tmp_path / "model")
    plan = make_plan(open_source(model), Recipe.load("equal-bits"))
    assert plan.recipe.seq_len == 100
    assert "128 x 100 tokens, as many as the model has positions for" in describe_plan(plan)
    # Changes to other fields leave that default in place.
    assert make_plan(open_source(model), Recipe.load("equal-bits", {"bits": 2})).recipe.seq_len == 100
    assert make_plan(open_source(model), Recipe.load("equal-bits").changed({"bits": 2})).recipe.seq_len == 100
    (tmp_path / "own.yaml").write_text("seq_len: 101\n")
    for recipe in (
        Recipe.load("equal-bits", {"seq_len": 512}),
        Recipe.load(str(tmp_path / "own.yaml")),
        Recipe.load("equal-bits").changed({"seq_len": 101}),
        Recipe.load("equal-bits", {"seq_len": 101}).changed({"bits": 2}),
        recipe_of(seq_len=101),
    ):
        with pytest.raises(RecipeError, match=r"longer than the 100 positions of .*model; give `seq_len` 100 or less"):
            make_plan(open_source(model), recipe)
    assert make_plan(open_source(model), Recipe.load("equal-bits", {"seq_len": 100})).recipe.seq_len == 100


def test_description_names_kinds_sizes_and_kept_parts(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    text = describe_plan(plan_of(tmp_path))
    for part in ("self_attn.q_proj", "mlp.down_proj", "LlamaForCausalLM", "at the peak", "self"):
        assert part in text
    assert "Embedding     16.0 kB: lm_head, 320 x 48, 8-bit rows" in text
    description = describe_plan(plan_of(tmp_path, embedding_bits=16))
    assert "1 x embedding" in description
    assert "1 x output head" in description
    assert "8-bit" not in description


def test_description_names_unread_tensors(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"tower.blocks.0.weight": torch.ones(6, 5)}, file)
    assert "Not read      tower (1 tensor, 120 B, no part of LlamaForCausalLM)" in describe_plan(plan_of(tmp_path))
