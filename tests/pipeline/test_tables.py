"""Which matrices become 8-bit rows, and that the rest of a run sees what they decode to."""

from __future__ import annotations

import json

import pytest
import torch
from formats import recipe_of
from tiny_models import FAMILIES, save_tiny, tiny_model
from tiny_vision import save_tiny_vision
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import shiftadd_cli
from shiftadd_cli.artifact.contents import Contents
from shiftadd_cli.artifact.folder import Artifact
from shiftadd_cli.artifact.verify import verify
from shiftadd_cli.errors import NumericalError
from shiftadd_cli.pipeline import run as run_module
from shiftadd_cli.pipeline.job import Job
from shiftadd_cli.pipeline.plan import make_plan
from shiftadd_cli.pipeline.tables import plan_tables, store_table
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.runtime.opened import load_any
from shiftadd_cli.source import find_structure, open_source

QUICK = {"samples": 8, "seq_len": 32, "batch_size": 3, "group_size": 16, "bits": 4}
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


def planned(model, **fields):
    return plan_tables(model, find_structure(model), recipe_of(**fields))


def quantize(model, out, recipe="fast", **fields):
    plan = make_plan(open_source(str(model)), Recipe.load(recipe, QUICK | fields))
    return plan, Job(plan, out).run()


@pytest.mark.parametrize("family", FAMILIES)
def test_input_and_output_tied_ones_once(family):
    model = tiny_model(family)
    tables, kept = planned(model)
    embed = EMBEDDINGS[family]
    expected = [(embed,), ("lm_head",)] if family in ("llama", "mistral", "phi") else [(embed, "lm_head")]
    assert [each.modules for each in tables] == expected
    for each in tables:
        assert model.get_submodule(each.name).weight.shape == each.shape
    held = {name for names in expected for name in names}
    assert kept == tuple(pair for pair in find_structure(model).kept if pair[0] not in held)


def test_positions_stay():
    _, kept = planned(tiny_model("gpt2"))
    assert ("transformer.wpe", "embedding") in kept


def test_sixteen_bits_leave_everything():
    model = tiny_model("llama")
    assert planned(model, embedding_bits=16) == ((), find_structure(model).kept)


@pytest.mark.parametrize(("family", "left"), [("llama", ["model.embed_tokens"]), ("qwen2", [])])
def test_a_skipped_head_takes_what_it_is_tied_to_along(family, left):
    tables, kept = planned(tiny_model(family), skip=("lm_head",))
    assert [each.name for each in tables] == left
    assert any(name == "lm_head" or "embed" in name for name, reason in kept if "skipped by lm_head" in reason)


class OwnLookup(nn.Embedding):
    def forward(self, ids):
        return self.weight[ids]


class Normed(nn.Embedding):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.norm = nn.LayerNorm(sizes[1])

    def forward(self, ids):
        return self.norm(super().forward(ids))


class Doubled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) + super().forward(ids) * self.weight.mean()


def with_embedding(embedding):
    model = tiny_model("llama")
    model.set_input_embeddings(embedding)
    return model.to("meta")


@pytest.mark.parametrize(
    ("embedding", "held"),
    [
        (Gemma3TextScaledWordEmbedding(320, 48, 0, 3.0), True),
        (Normed(320, 48), True),
        (OwnLookup(320, 48), False),
        (Doubled(320, 48), False),
        (nn.Embedding(320, 48, max_norm=1.0), False),
    ],
)
def test_a_forward_that_reads_the_weight_in_its_own_way_is_left_alone(embedding, held):
    tables, kept = planned(with_embedding(embedding))
    assert ("model.embed_tokens" in [each.name for each in tables]) == held
    assert (("model.embed_tokens", "embedding, with a custom forward") in kept) == (not held)
    assert "lm_head" in [each.name for each in tables]
    assert all(parameter.is_meta for parameter in embedding.parameters())


def test_storing_decodes_in_place_for_all_that_is_tied():
    model = tiny_model("qwen2", dtype=torch.bfloat16)
    (table,), _ = planned(model)
    before, stored = model.lm_head.weight.float().clone(), {}
    report = store_table(table, model, stored.__setitem__)
    assert {name: (tuple(each.shape), each.dtype) for name, each in stored.items()} == table.tensors()
    decoded = stored["model.embed_tokens.weight_int8"] * stored["model.embed_tokens.weight_int8_scale"].float()[:, None]
    assert torch.equal(model.lm_head.weight, decoded.bfloat16())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    error = (before - decoded).square().sum() / before.square().sum()
    assert report.weight_error == pytest.approx(error.item(), rel=1e-4)
    assert report.modules == ["model.embed_tokens", "lm_head"]


def test_a_weight_that_is_not_finite_is_named(tmp_path):
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
def test_calibration_sees_the_decoded_embedding(tmp_path, family, monkeypatch):
    save_tiny(family, tmp_path / "source")
    seen = []
    plain = run_module.trace_model

    def spy(model, *rest, **options):
        seen.append(model.skeleton.get_input_embeddings().weight.detach().clone())
        return plain(model, *rest, **options)

    monkeypatch.setattr(run_module, "trace_model", spy)
    quantize(tmp_path / "source", tmp_path / "out", "default")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(seen[0], packed.get_input_embeddings().decode())


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi"])
def test_every_account_of_the_sizes_is_the_same_and_true(tmp_path, family):
    save_tiny(family, tmp_path / "source")
    plan, report = quantize(tmp_path / "source", tmp_path / "out")
    artifact = Artifact.open(tmp_path / "out")
    verify(artifact)
    contents = Contents.of(artifact)
    assert plan.table_bytes == report.size.table_bytes == contents.table_bytes > 0
    assert plan.kept_bytes == report.size.kept_bytes == contents.kept_bytes
    tables = {name: shape for each in plan.tables for name, shape in each.tensors().items()}
    assert {name: artifact.tensors[name] for name in tables} == tables
    stored = report.size.quantized_bytes + report.size.table_bytes + report.size.kept_bytes
    assert plan.after_bytes == stored
    headers = 8 + int.from_bytes((tmp_path / "out" / "model.safetensors").read_bytes()[:8], "little")
    assert report.size.files_bytes == artifact.file_bytes == stored + headers
    assert report.size.whole_file_bits_per_weight == pytest.approx(contents.file_bits_per_weight)
    info = load_any(str(tmp_path / "out")).info
    assert info.parameters == plan.parameters
    assert info.file_bits_per_weight == pytest.approx(report.size.whole_file_bits_per_weight)
    assert info.quantized_bits_per_weight == pytest.approx(report.size.bits_per_weight)
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [each["modules"] for each in written["tables"]] == [list(each.modules) for each in plan.tables]
    assert not {"embedding", "output head"} & {each["reason"] for each in written["kept"]}


def test_halving_the_embedding_costs_next_to_nothing(tmp_path):
    save_tiny("llama", tmp_path / "source")
    _, small = quantize(tmp_path / "source", tmp_path / "small")
    _, large = quantize(tmp_path / "source", tmp_path / "large", embedding_bits=16)
    assert (large.size.table_bytes, large.tables) == (0, [])
    assert small.size.files_bytes < large.size.files_bytes - 2 * 320 * 48 * 2.5
    assert all(0 < each.weight_error < 1e-4 for each in small.tables)


def test_patches_of_images_stay_as_they_are_where_that_is_asked_for(tmp_path):
    source = save_tiny_vision("vit", tmp_path / "source")
    _, small = quantize(source, tmp_path / "small", recipe="fast")
    (table,) = small.tables
    place = table.modules[0]
    _, large = quantize(source, tmp_path / "large", recipe="fast", embedding_bits=16)
    _, skipped = quantize(source, tmp_path / "skipped", recipe="fast", skip=(place,))
    for report, reason in ((large, "patch embedding"), (skipped, f"patch embedding, skipped by {place}")):
        assert report.tables == []
        assert reason in {each.reason for each in report.kept if each.name == place}
    dense = open_source(str(source)).load_model().get_submodule(place).weight
    assert torch.equal(shiftadd_cli.load(tmp_path / "skipped").get_submodule(place).weight, dense)
