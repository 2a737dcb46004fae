"""Embeddings and heads in 8-bit rows and in planes, and the decoded values that the rest of a run sees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from formats import recipe_of
from tiny_models import FAMILIES, save_tiny, tiny_model
from tiny_vision import save_tiny_vision
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import shiftadd_cli
from shiftadd_cli.artifact.contents import Contents
from shiftadd_cli.artifact.folder import Artifact
from shiftadd_cli.artifact.verify import verify
from shiftadd_cli.bcq.weight import QuantizedWeight
from shiftadd_cli.blockwise.model import BlockwiseModel
from shiftadd_cli.blockwise.trace import Trace
from shiftadd_cli.context import ALONE_ON_CPU
from shiftadd_cli.errors import NumericalError
from shiftadd_cli.pipeline import run as run_module
from shiftadd_cli.pipeline import tables as tables_module
from shiftadd_cli.pipeline.job import Job
from shiftadd_cli.pipeline.plan import Plan, make_plan
from shiftadd_cli.pipeline.tables import PlannedTable, encode_weight, place_weight, plan_tables
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.report.schema import Report
from shiftadd_cli.runtime.opened import load_any
from shiftadd_cli.runtime.table import PackedTable, Table
from shiftadd_cli.source import find_structure, open_source

Planned = tuple[tuple[PlannedTable, ...], tuple[tuple[str, str], ...]]
QUICK: dict[str, Any] = {"samples": 8, "seq_len": 32, "batch_size": 3, "group_size": 16, "bits": 4}
CPU = torch.device("cpu")
EMBEDDINGS = {
    "llama": "model.embed_tokens",
    "mistral": "model.embed_tokens",
    "qwen2": "model.embed_tokens",
    "qwen3": "model.embed_tokens",
    "gemma3": "model.embed_tokens",
    "phi": "model.embed_tokens",
    "opt": "model.decoder.embed_tokens",
    "gpt2": "transformer.wte",
    "bloom": "transformer.word_embeddings",
}


def planned(model: PreTrainedModel, **fields: Any) -> Planned:
    return plan_tables(model, find_structure(model), recipe_of(**fields))


def quantize(model: Path, out: Path, recipe: str = "fast", **fields: Any) -> tuple[Plan, Report]:
    plan = make_plan(open_source(str(model)), Recipe.load(recipe, QUICK | fields))
    report = Job(plan, out).run()
    assert report is not None
    return plan, report


@pytest.mark.parametrize("family", FAMILIES)
def test_embedding_and_head_become_one_table_if_tied(family: str) -> None:
    model = tiny_model(family)
    tables, unquantized = planned(model)
    embed = EMBEDDINGS[family]
    expected = [(embed,), ("lm_head",)] if family in ("llama", "mistral", "phi") else [(embed, "lm_head")]
    assert [table.modules for table in tables] == expected
    for table in tables:
        assert model.get_submodule(table.name).weight.shape == table.shape
    table_names = {name for names in expected for name in names}
    assert unquantized == tuple(pair for pair in find_structure(model).kept if pair[0] not in table_names)


def test_position_embeddings_stay_unquantized() -> None:
    _, unquantized = planned(tiny_model("gpt2"))
    assert ("transformer.wpe", "embedding") in unquantized


def test_sixteen_bits_leave_everything_unquantized() -> None:
    model = tiny_model("llama")
    assert planned(model, embedding_bits=16) == ((), find_structure(model).kept)


@pytest.mark.parametrize(("family", "expected"), [("llama", ["model.embed_tokens"]), ("qwen2", [])])
def test_skipped_head_excludes_its_tied_embedding(family: str, expected: list[str]) -> None:
    tables, unquantized = planned(tiny_model(family), skip=("lm_head",))
    assert [table.name for table in tables] == expected
    assert any(name == "lm_head" or "embed" in name for name, reason in unquantized if "skipped by lm_head" in reason)


class OwnLookup(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids]


class Normed(nn.Embedding):
    def __init__(self, rows: int, width: int) -> None:
        super().__init__(rows, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(super().forward(ids))


class Doubled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + super().forward(ids) * self.weight.mean()


def with_embedding(embedding: nn.Embedding) -> PreTrainedModel:
    model: Any = tiny_model("llama")
    model.set_input_embeddings(embedding)
    return model.to("meta")


@pytest.mark.parametrize(
    ("embedding", "becomes_table"),
    [
        (Gemma3TextScaledWordEmbedding(320, 48, 0, 3.0), True),
        (Normed(320, 48), True),
        (OwnLookup(320, 48), False),
        (Doubled(320, 48), False),
        (nn.Embedding(320, 48, max_norm=1.0), False),
    ],
)
def test_embedding_with_a_custom_forward_is_left_alone(embedding: nn.Embedding, becomes_table: bool) -> None:
    tables, unquantized = planned(with_embedding(embedding))
    assert ("model.embed_tokens" in [table.name for table in tables]) == becomes_table
    assert (("model.embed_tokens", "embedding, with a custom forward") in unquantized) == (not becomes_table)
    assert "lm_head" in [table.name for table in tables]
    assert all(parameter.is_meta for parameter in embedding.parameters())


def test_storing_decodes_tied_modules_in_place() -> None:
    model = tiny_model("qwen2", dtype=torch.bfloat16)
    (table,), _ = planned(model)
    before = model.get_parameter("lm_head.weight").float().clone()
    stored, output_error = encode_weight(table, table.weight(model), recipe_of(), None, ALONE_ON_CPU)
    assert {suffix: (tuple(tensor.shape), tensor.dtype) for suffix, tensor in stored.items()} == table.layout.tensors()
    weight_error = place_weight(table, model, stored)
    decoded = stored["weight_int8"] * stored["weight_int8_scale"].float()[:, None]
    assert torch.equal(model.get_parameter("lm_head.weight"), decoded.bfloat16())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    error = (before - decoded).square().sum() / before.square().sum()
    assert weight_error == pytest.approx(error.item(), rel=1e-4)
    assert output_error is None


def test_non_finite_weight_is_named(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.lm_head.weight.data[2, 1] = torch.nan
    model.save_pretrained(tmp_path / "source")
    save_tiny("qwen2", tmp_path / "tokenizer")
    for file in (tmp_path / "tokenizer").glob("token*"):
        file.rename(tmp_path / "source" / file.name)
    with pytest.raises(NumericalError, match="weight of lm_head is not finite"):
        quantize(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_original_is_followed_with_its_own_embedding(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(family, tmp_path / "source")
    embeddings: list[Tensor] = []
    trace_model = run_module.trace_model

    def spy(model: BlockwiseModel, *rest: Any, **options: Any) -> Trace:
        embeddings.append(model.skeleton.get_input_embeddings().weight.detach().clone())
        return trace_model(model, *rest, **options)

    monkeypatch.setattr(run_module, "trace_model", spy)
    quantize(tmp_path / "source", tmp_path / "out", "default")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    packed_embedding = packed.get_input_embeddings()
    assert isinstance(packed_embedding, Table)
    original = open_source(str(tmp_path / "source")).load_model()
    assert torch.equal(embeddings[0], original.get_parameter(f"{EMBEDDINGS[family]}.weight"))
    assert torch.equal(embeddings[1], packed_embedding.decode())


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi"])
def test_reported_sizes_agree_with_the_files(tmp_path: Path, family: str) -> None:
    save_tiny(family, tmp_path / "source")
    plan, report = quantize(tmp_path / "source", tmp_path / "out")
    artifact = Artifact.open(tmp_path / "out")
    verify(artifact)
    contents = Contents.of(artifact)
    assert plan.table_bytes == report.size.table_bytes == contents.table_bytes > 0
    assert plan.kept_bytes == report.size.kept_bytes == contents.kept_bytes
    tables = {name: shape for table in plan.tables for name, shape in table.tensors().items()}
    assert {name: artifact.tensors[name] for name in tables} == tables
    stored = report.size.quantized_bytes + report.size.table_bytes + report.size.kept_bytes
    headers = 8 + int.from_bytes((tmp_path / "out" / "model.safetensors").read_bytes()[:8], "little")
    assert plan.file_bytes == report.size.files_bytes == artifact.file_bytes == stored + headers
    assert report.size.whole_file_bits_per_weight == pytest.approx(contents.file_bits_per_weight)
    info = load_any(str(tmp_path / "out")).info
    assert info.parameters == plan.parameters
    assert info.file_bits_per_weight == pytest.approx(report.size.whole_file_bits_per_weight)
    assert info.quantized_bits_per_weight == pytest.approx(report.size.bits_per_weight)
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [entry["modules"] for entry in written["tables"]] == [list(entry.modules) for entry in plan.tables]
    assert not {"embedding", "output head"} & {entry["reason"] for entry in written["kept"]}


def test_halving_the_embedding_costs_almost_no_accuracy(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    _, small = quantize(tmp_path / "source", tmp_path / "small")
    _, large = quantize(tmp_path / "source", tmp_path / "large", embedding_bits=16)
    assert (large.size.table_bytes, large.tables) == (0, [])
    assert small.size.files_bytes < large.size.files_bytes - 2 * 320 * 48 * 2.5
    assert all(0 < table.weight_error < 1e-4 for table in small.tables)


def test_patch_embedding_stays_unquantized_on_request(tmp_path: Path) -> None:
    source = save_tiny_vision("vit", tmp_path / "source")
    _, small = quantize(source, tmp_path / "small", recipe="fast")
    patches, classifier = (table.modules[0] for table in small.tables)
    _, large = quantize(source, tmp_path / "large", recipe="fast", embedding_bits=16)
    _, skipped = quantize(source, tmp_path / "skipped", recipe="fast", skip=(patches,))
    assert large.tables == []
    assert [table.modules for table in skipped.tables] == [[classifier]]
    for report, reason in ((large, "patch embedding"), (skipped, f"patch embedding, skipped by {patches}")):
        assert reason in {module.reason for module in report.kept if module.name == patches}
    assert (classifier, "classifier") in {(module.name, module.reason) for module in large.kept}
    dense = open_source(str(source)).load_model().get_parameter(f"{patches}.weight")
    assert torch.equal(shiftadd_cli.load(tmp_path / "skipped").get_parameter(f"{patches}.weight"), dense)


IN_PLANES = {"embedding_bits": "trellis1-3", "bits": 3, "primitive": "bcq"}


@pytest.mark.parametrize("family", FAMILIES)
def test_embedding_and_head_in_planes_load_and_agree_with_the_report(tmp_path: Path, family: str) -> None:
    save_tiny(family, tmp_path / "source")
    plan, report = quantize(tmp_path / "source", tmp_path / "out", "equal-bits", **IN_PLANES)
    assert [entry.modules for entry in report.tables] == [list(table.modules) for table in plan.tables]
    assert plan.file_bytes == report.size.files_bytes
    model, dense = shiftadd_cli.load(tmp_path / "out"), open_source(str(tmp_path / "source")).load_model()
    for table, entry in zip(plan.tables, report.tables, strict=True):
        assert (entry.primitive, entry.bits) == ("trellis1", 3)
        before, after = dense.get_parameter(f"{table.name}.weight").float(), model.get_submodule(table.name)
        assert isinstance(after, PackedTable)
        error = (before - after.decode()).square().sum() / before.square().sum()
        assert entry.weight_error == pytest.approx(float(error), rel=1e-3)
        assert (entry.output_error is None) == (table.modules == (EMBEDDINGS[family],))
    info = load_any(str(tmp_path / "out")).info
    assert info.parameters == plan.parameters
    assert info.quantized_bits_per_weight == pytest.approx(report.size.bits_per_weight)


def test_head_is_fitted_to_what_it_reads(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    model = open_source(str(tmp_path / "source")).load_model()
    table = next(table for table in planned(model, **IN_PLANES)[0] if table.name == "lm_head")
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(500, 48, generator=generator) * torch.logspace(0, -2, 48)
    moment = inputs.T @ inputs / 500
    weight = model.get_parameter("lm_head.weight").detach().clone()
    errors = []
    for form in (moment, None):
        tensors, reported = encode_weight(table, table.weight(model), recipe_of(**IN_PLANES), form, ALONE_ON_CPU)
        layout = table.layout.packed
        assert layout is not None
        difference = (weight - QuantizedWeight(layout, tensors).decode()) @ inputs.T
        errors.append(float(difference.square().sum() / (weight @ inputs.T).square().sum()))
        assert reported == (pytest.approx(errors[-1], rel=1e-3) if form is not None else None)
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("form", ["trellis1-2", 3])
def test_large_vocabularies_are_solved_in_tiles(monkeypatch: pytest.MonkeyPatch, form: int | str) -> None:
    model = tiny_model("llama")
    recipe = recipe_of(embedding_bits=form, bits=3)
    table = planned(model, embedding_bits=form, bits=3)[0][0]
    whole, _ = encode_weight(table, table.weight(model), recipe, None, ALONE_ON_CPU)
    # A tile of 256 rows and one of 64.
    monkeypatch.setattr(tables_module, "TILE_WEIGHTS", 256 * 48)
    parts, _ = encode_weight(table, table.weight(model), recipe, None, ALONE_ON_CPU)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    weight = model.get_parameter(f"{table.name}.weight")
    place_weight(table, model, parts)
    assert table.layout.packed is not None
    torch.testing.assert_close(weight.detach(), QuantizedWeight(table.layout.packed, whole).decode())


@pytest.mark.parametrize("fields", [{}, {"calibration": "none", "sweep": "none", "refine_rounds": 0}])
def test_patch_embedding_and_classifier_in_planes(tmp_path: Path, fields: dict[str, Any]) -> None:
    source = save_tiny_vision("vit", tmp_path / "source")
    options = {"calibration": "noise", "embedding_bits": 4, **fields}
    _, report = quantize(source, tmp_path / "out", "equal-bits", **options)
    assert len(report.tables) == 2
    model, original = shiftadd_cli.load(tmp_path / "out"), open_source(str(source)).load_model()
    for entry in report.tables:
        assert (entry.bits, entry.primitive, entry.output_error is None) == (4, "bcq", bool(fields))
        loaded = model.get_submodule(entry.modules[0])
        assert isinstance(loaded, PackedTable)
        dense = original.get_parameter(f"{entry.modules[0]}.weight")
        assert 0 < (loaded.decode() - dense).norm() < 0.3 * dense.norm()
