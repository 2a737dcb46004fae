"""Mixtures of experts through whole runs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from bit_plans import plan_for
from click.testing import CliRunner
from stopped_runs import contents, counting_text, stopped
from tiny_models import MIXTURES, save_tiny
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import shiftadd_cli
from shiftadd_cli.artifact.folder import Artifact
from shiftadd_cli.artifact.verify import verify
from shiftadd_cli.bcq.solver import quantize_matrices
from shiftadd_cli.calibration import mixtures
from shiftadd_cli.cli import main
from shiftadd_cli.cli.describe import describe_plan
from shiftadd_cli.cli.describe_bits import describe_bit_plan
from shiftadd_cli.cli.summary import summarize
from shiftadd_cli.export.dense import export_dense
from shiftadd_cli.pipeline.plan import make_plan
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.report.schema import Report
from shiftadd_cli.runtime.linear import PackedLinear
from shiftadd_cli.runtime.table import Table
from shiftadd_cli.source import open_source
from shiftadd_cli.source.experts import split_experts

TOKENS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
QUICK: dict[str, Any] = {
    "samples": 8, "seq_len": 64, "batch_size": 3, "group_size": 16, "fit_rounds": 1, "refine_rounds": 1,
}  # fmt: skip
QUICK_RUN = QUICK | {"recipe": "equal-bits"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(counting_text(tmp_path_factory.mktemp("text") / "text.txt"))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("mixtral", tmp_path_factory.mktemp("source") / "model")


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def packed_linear(model: PreTrainedModel, name: str) -> PackedLinear:
    linear = model.get_submodule(name)
    assert isinstance(linear, PackedLinear)
    return linear


def decoded(source: Path, packed: PreTrainedModel, report: Report) -> PreTrainedModel:
    """transformers' own model with the decoded weights of the packed one, stacked experts included."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, experts_implementation="eager")
    split_experts(model)
    for layer in report.layers:
        module, linear = model.get_submodule(layer.name), packed_linear(packed, layer.name)
        module.weight.data = linear.decode()
        if module.bias is not None:
            assert linear.bias is not None
            module.bias.data = linear.bias.data
    for table in report.tables:
        for name in table.modules:
            table_module = packed.get_submodule(name)
            assert isinstance(table_module, Table)
            model.get_submodule(name).weight.data = table_module.decode()
    for name, module in model.named_modules():
        if (joined := getattr(module, "joined", None)) is not None:
            model.set_submodule(name, joined())
    return model


@pytest.mark.parametrize("family", MIXTURES)
def test_checkpoint_loads_and_computes_with_the_decoded_weights(tmp_path: Path, text: str, family: str) -> None:
    source, out = save_tiny(family, tmp_path / "source"), tmp_path / "out"
    report = shiftadd_cli.quantize(source, out, calibration=text, bits=4, **QUICK_RUN)
    verify(Artifact.open(out))
    packed = load(out)
    dense = decoded(source, packed, report)
    torch.testing.assert_close(logits(packed), logits(dense), rtol=1e-4, atol=1e-4)
    reasons = {module.name: module.reason for module in report.kept}
    routers = [name for name, reason in reasons.items() if reason == "router"]
    assert routers
    original = load(source)
    for name in routers:
        assert torch.equal(packed.get_parameter(f"{name}.weight"), original.get_parameter(f"{name}.weight"))
    tokens = QUICK["samples"] * QUICK["seq_len"]
    sent = Counter[str]()
    for layer in report.layers:
        if ".experts." not in layer.name:
            assert layer.tokens == tokens
            continue
        assert layer.tokens is not None
        assert layer.calibrated == (layer.tokens >= layer.in_features)
        sent[layer.name.rpartition(".experts.")[0] + layer.name.rpartition(".")[2]] += layer.tokens
    # Each token is sent to two experts.
    assert set(sent.values()) == {2 * tokens}
    assert "experts.*.down_proj" in summarize(report, "out")
    export_dense(out, tmp_path / "dense")
    torch.testing.assert_close(logits(load(tmp_path / "dense")), logits(dense), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("mixtral", {"loss_aware": 0.5}),
        ("mixtral", {"asymmetric": 0.0}),
        ("qwen2_moe", {"reconstruct_epochs": 1}),
        ("mixtral", {"true_sequential": False}),
        ("gpt_oss", {"bias_correction": True}),
        ("olmoe", {"primitive": "shift2", "bits": 4}),
        ("qwen3_moe", {"outlier_columns": 0.05, "rotation": "none"}),
        ("mixtral", {"avg_bits": 7.0}),
    ],
    ids=str,
)
def test_every_way_to_calibrate_writes_a_loadable_checkpoint(
    tmp_path: Path, text: str, family: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHIFTADD_CACHE", str(tmp_path / "cache"))
    source = save_tiny(family, tmp_path / "source")
    report = shiftadd_cli.quantize(source, tmp_path / "out", calibration=text, **(QUICK_RUN | fields))
    packed = load(tmp_path / "out")
    assert torch.isfinite(logits(packed)).all()
    torch.testing.assert_close(logits(packed), logits(load(tmp_path / "out").dequantize()), rtol=1e-4, atol=1e-4)
    if "avg_bits" in fields:
        bits = {layer.name: layer.choice for layer in report.layers}
        pairs = [(name, name.replace("gate_proj", "up_proj")) for name in bits if name.endswith("gate_proj")]
        assert len(pairs) == 2 * 4
        assert all(bits[gate] == bits[up] for gate, up in pairs)


def test_experts_with_too_few_tokens_are_fitted_without_data_and_named(
    tmp_path: Path, text: str, mixtral: Path
) -> None:
    fields = QUICK | {"samples": 1, "seq_len": 24, "bits": 2, "rotation": "none"}
    report = shiftadd_cli.quantize(mixtral, tmp_path / "out", "equal-bits", calibration=text, **fields)
    starved = {layer.name for layer in report.starved}
    assert len(starved) > 0
    assert all(".experts." in name for name in starved)
    packed = load(tmp_path / "out")
    source = open_source(str(mixtral))
    source.materialise([""])
    options = Recipe.load("equal-bits", fields).solver_options.without_data()
    for layer in report.layers:
        if layer.name in starved:
            assert layer.output_error is None
            assert layer.tokens is not None
            assert layer.tokens < layer.in_features
            weight = source.skeleton().get_parameter(f"{layer.name}.weight")
            (alone,) = quantize_matrices([weight], [layer.name], None, options)
            assert torch.equal(packed_linear(packed, layer.name).decode(), alone.weight.decode())
    warning = next(line for line in summarize(report, "out").splitlines() if line.startswith("Few tokens"))
    first = next(layer for layer in report.layers if layer.name in starved)
    assert f"{len(starved)} of {len(report.layers)} layers" in warning
    assert f"{first.name} ({first.tokens})" in warning
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"{len(starved)} layers read too few calibration tokens" in page
    assert all(name in page for name in starved)


def test_room_for_moments_changes_nothing(
    tmp_path: Path, text: str, mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shiftadd_cli.quantize(mixtral, tmp_path / "one", calibration=text, **QUICK_RUN)
    monkeypatch.setattr(mixtures, "ROOM_BYTES", 0)
    shiftadd_cli.quantize(mixtral, tmp_path / "other", calibration=text, **QUICK_RUN)
    one, other = contents(tmp_path / "one"), contents(tmp_path / "other")
    assert one["model.safetensors"] == other["model.safetensors"]
    assert one["report.json"]["layers"] == other["report.json"]["layers"]


def test_stopped_run_resumes_to_the_same_bytes(
    tmp_path: Path, text: str, mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = QUICK_RUN | {"loss_aware": 0.5, "calibration": text}
    shiftadd_cli.quantize(mixtral, tmp_path / "whole", **fields)
    stopped(monkeypatch, 1, mixtral, tmp_path / "out", **fields)
    shiftadd_cli.quantize(mixtral, tmp_path / "out", **fields)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("skip", ["*.experts", "*.experts.1", "*.down_proj"])
def test_skipped_experts_are_stored_separately_and_unchanged(
    tmp_path: Path, text: str, mixtral: Path, skip: str
) -> None:
    report = shiftadd_cli.quantize(mixtral, tmp_path / "out", calibration=text, skip=[skip], **QUICK_RUN)
    packed = load(tmp_path / "out")
    torch.testing.assert_close(logits(packed), logits(decoded(mixtral, packed, report)), rtol=1e-4, atol=1e-4)
    original = load(mixtral)
    split_experts(original)
    name = "model.layers.0.mlp.experts.1.down_proj"
    assert isinstance(packed.get_submodule(name), nn.Linear)
    assert torch.equal(packed.get_parameter(f"{name}.weight"), original.get_parameter(f"{name}.weight"))
    export_dense(tmp_path / "out", tmp_path / "dense")
    torch.testing.assert_close(logits(load(tmp_path / "dense")), logits(packed), rtol=1e-4, atol=1e-4)


def test_plan_counts_the_tokens_that_experts_read(mixtral: Path) -> None:
    plan = make_plan(open_source(str(mixtral)), Recipe.load("equal-bits", QUICK))
    assert plan.artifact_format().split_experts
    (line,) = (line for line in describe_plan(plan).splitlines() if "gate_proj" in line)
    assert line.split()[:6] == ["mlp.experts.*.gate_proj", "8", "44", "x", "32", "3"]
    assert plan.parameters == sum(parameter.numel() for parameter in load(mixtral).parameters())
    # Each expert reads half of the tokens, because every token is sent to two of four.
    inputs = 4 * 32 + (2 * 32 + 44) * 4 // 2
    outputs = sum(
        linear.spec.out_features for linear in plan.linears if linear.spec.block == 0 and not linear.spec.experts
    )
    outputs += (2 * 44 + 32) * 4 // 2
    waiting = QUICK["samples"] * QUICK["seq_len"] * 4 * (inputs + outputs)
    states = 2 * 2 * QUICK["samples"] * QUICK["seq_len"] * 32 * 4
    assert plan.state_bytes == states + waiting


def test_bit_plan_shows_the_most_common_bits_of_experts(mixtral: Path) -> None:
    recipe = Recipe.load("equal-bits", QUICK)
    plan = plan_for(mixtral, recipe, lambda _: 3)
    layers = dict(plan.layers)
    name = "model.layers.1.mlp.experts.3.up_proj"
    layers[name] = layers[name].model_copy(update={"bits": 2})
    linears = make_plan(open_source(str(mixtral)), recipe).structure.linears
    description = describe_bit_plan(plan.model_copy(update={"layers": layers}), linears)
    (line,) = (line for line in description.splitlines() if "up_proj" in line)
    assert line.split()[:3] == ["mlp.experts.*.up_proj", "33", "2.875"]


def test_unknown_kinds_of_experts_are_refused(tmp_path: Path, text: str) -> None:
    save_tiny("dbrx", tmp_path / "model")
    result = CliRunner().invoke(
        main, ["quantize", str(tmp_path / "model"), "-o", str(tmp_path / "out"), "--calibration", text]
    )
    assert result.exit_code == 2, result.output
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    assert "ffn.experts.mlp, a DbrxExpertGLU" in last
    assert not (tmp_path / "out").exists()


def test_older_report_without_token_counts_is_read(tmp_path: Path, text: str, mixtral: Path) -> None:
    shiftadd_cli.quantize(mixtral, tmp_path / "out", calibration=text, **QUICK_RUN)
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    del written["files"]
    for layer in written["layers"]:
        del layer["tokens"]
    assert all(layer.tokens is None for layer in Report.model_validate(written).layers)
