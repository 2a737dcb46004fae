"""The main job: it writes the solved weights, on every architecture, and the same bytes every time."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from bit_plans import plan_for
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, save_tiny, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import shiftadd_cli  # noqa: F401 - registers the format with transformers
from shiftadd_cli.artifact.contents import Contents
from shiftadd_cli.artifact.folder import Artifact
from shiftadd_cli.artifact.verify import verify
from shiftadd_cli.bcq.choices import Choice
from shiftadd_cli.cli.summary import summarize
from shiftadd_cli.context import Context
from shiftadd_cli.errors import CalibrationError, NumericalError
from shiftadd_cli.pipeline.calibration import draw_calibration
from shiftadd_cli.pipeline.job import Job
from shiftadd_cli.pipeline.plan import Plan, make_plan
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.report.schema import Report
from shiftadd_cli.runtime.linear import PackedLinear
from shiftadd_cli.runtime.table import Table
from shiftadd_cli.source import model as source_model
from shiftadd_cli.source import open_source

QUICK: dict[str, Any] = {"samples": 8, "seq_len": 32, "batch_size": 3, "group_size": 16}
CPU = torch.device("cpu")


def quantize(
    model: Path, out: Path, recipe: str = "default", bits_of: Mapping[str, Choice] | None = None, **fields: Any
) -> Report:
    return run(make_plan(open_source(str(model)), Recipe.load(recipe, QUICK | fields), bits_of), out)


def run(plan: Plan, out: Path) -> Report:
    report = Job(plan, out).run(["quantize"])
    assert report is not None
    return report


def put_decoded(report: Report, packed: PreTrainedModel, dense: PreTrainedModel) -> None:
    """Give the dense model the decoded weights and the corrected biases of the packed one."""
    for layer in report.layers:
        module, linear = dense.get_submodule(layer.name), packed.get_submodule(layer.name)
        assert isinstance(linear, PackedLinear)
        module.weight.data = linear.decode().T if type(module).__name__ == "Conv1D" else linear.decode()
        if module.bias is not None:
            assert linear.bias is not None
            module.bias.data = linear.bias.data


def file_sum(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_artifact_loads_and_computes_with_the_decoded_weights(tmp_path: Path, family: str) -> None:
    source = tmp_path / "source"
    save_tiny(family, source)
    report = quantize(source, tmp_path / "out", bits=4)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    original = logits(dense, tokens)
    put_decoded(report, packed, dense)
    for table in report.tables:
        for name in table.modules:
            module = packed.get_submodule(name)
            assert isinstance(module, Table)
            dense.get_submodule(name).weight.data = module.decode()
    expected = logits(dense, tokens)
    torch.testing.assert_close(logits(packed, tokens), expected, rtol=1e-4, atol=1e-4)
    # With four bits the model differs from the original, but is still recognizably the same.
    distance = (expected - original).norm() / original.norm()
    assert 0 < distance < 0.5


@pytest.mark.parametrize("fields", [{}, {"rotation": "none"}, {"reconstruct_epochs": 1}])
def test_outlier_columns_survive_storing_loading_and_saving(tmp_path: Path, fields: dict[str, Any]) -> None:
    source = tmp_path / "source"
    save_tiny("llama", source)
    report = quantize(source, tmp_path / "out", outlier_columns=0.05, embedding_bits=16, **fields)
    artifact = Artifact.open(tmp_path / "out")
    verify(artifact)
    assert Contents.of(artifact).bits_per_weight == report.size.bits_per_weight
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).dequantize()
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits(packed, tokens), logits(dense, tokens), rtol=1e-4, atol=1e-4)
    packed.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(logits(again, tokens), logits(packed, tokens))
    name = report.layers[0].name
    ids = packed.get_parameter(f"{name}.weight_column_ids")
    assert len(ids) == round(0.05 * report.layers[0].in_features)
    assert packed.get_parameter(f"{name}.weight_columns").dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_mixed_bits_load_and_compute_with_the_decoded_weights(tmp_path: Path, family: str) -> None:
    source = tmp_path / "source"
    save_tiny(family, source)
    linears = make_plan(open_source(str(source)), Recipe.load("default", QUICK)).linears
    bits = {linear.spec.name: 2 + index % 3 for index, linear in enumerate(linears)}
    report = quantize(source, tmp_path / "out", bits_of=bits, embedding_bits=16)
    assert {layer.name: layer.bits for layer in report.layers} == bits
    assert report.size.planes_per_weight != round(report.size.planes_per_weight)
    assert "without scales" in summarize(report, "out")
    artifact = Artifact.open(tmp_path / "out")
    verify(artifact)
    assert Contents.of(artifact).bits_per_weight == report.size.bits_per_weight
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    put_decoded(report, packed, dense)
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits(packed, tokens), logits(dense, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("primitive", ["shift1", "shift2"])
@pytest.mark.parametrize("fields", [{}, {"reconstruct_epochs": 1, "outlier_columns": 0.05}])
def test_shift_layers_survive_storing_loading_and_saving(
    tmp_path: Path, primitive: str, fields: dict[str, Any]
) -> None:
    source = tmp_path / "source"
    save_tiny("llama", source)
    report = quantize(source, tmp_path / "out", primitive=primitive, bits=3, embedding_bits=16, **fields)
    assert {(layer.primitive, layer.bits) for layer in report.layers} == {(primitive, 3)}
    artifact = Artifact.open(tmp_path / "out")
    verify(artifact)
    contents = Contents.of(artifact)
    assert (contents.format_version, {layer.primitive for layer in contents.layers}) == (2, {primitive})
    assert contents.bits_per_weight == report.size.bits_per_weight
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).dequantize()
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits(packed, tokens), logits(dense, tokens), rtol=1e-4, atol=1e-4)
    packed.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(logits(again, tokens), logits(packed, tokens))


def test_report_identifies_the_bit_plan(tmp_path: Path) -> None:
    source, path = tmp_path / "source", tmp_path / "plan.json"
    save_tiny("llama", source)
    bit_plan = plan_for(source, Recipe.load("default", QUICK))
    path.write_text(bit_plan.to_json())
    report = quantize(source, tmp_path / "out", bit_plan=str(path))
    assert {layer.name: layer.bits for layer in report.layers} == bit_plan.bits
    assert report.bit_plan is not None
    assert report.bit_plan.fingerprint == bit_plan.fingerprint()
    assert report.size.quantized_bytes == bit_plan.stored_bytes
    assert report.size.bits_per_weight == bit_plan.bits_per_weight
    assert json.loads((tmp_path / "out" / "report.json").read_text())["bit_plan"]["sensitivity"] == "output"


def test_same_command_writes_the_same_bytes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_tiny("llama", source)
    sums = []
    for name in ("a", "b"):
        quantize(source, tmp_path / name)
        sums.append(file_sum(tmp_path / name))
    assert sums[0] == sums[1]


@pytest.mark.parametrize("before", [(), ("<|user|>",)])
def test_report_names_the_window_start(tmp_path: Path, before: tuple[str, ...]) -> None:
    save_tiny("llama", tmp_path / "model", before=before)
    report = quantize(tmp_path / "model", tmp_path / "out", "equal-bits", samples=3)
    assert report.calibration is not None
    assert report.calibration.window_start == "".join(before)
    assert ("windows begin with <|user|>" in summarize(report, "out")) == bool(before)


def test_tokens_beyond_the_embedding_are_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<x>"])
    tokenizer.save_pretrained(save_tiny("llama", tmp_path / "model"))
    text = tmp_path / "x.txt"
    text.write_text("a line with <x> in it\n" * 200)
    plan = make_plan(
        open_source(str(tmp_path / "model")), Recipe.load("equal-bits", QUICK | {"calibration": str(text)})
    )
    with pytest.raises(CalibrationError, match=r"x\.txt has the token '<x>' \(id 320\), .*model has 320 rows"):
        draw_calibration(plan)


def test_another_seed_draws_other_windows(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    plans = [make_plan(open_source(str(tmp_path)), Recipe.load("default", QUICK | {"seed": seed})) for seed in (0, 1)]
    first, second = (draw_calibration(plan) for plan in plans)
    assert first is not None
    assert second is not None
    assert not torch.equal(first.samples, second.samples)


@pytest.mark.parametrize("recipe", ["fast", "gptq", "rtn", "shiftaddllm-acc", "shiftaddllm-lat"])
def test_every_packaged_recipe_runs(tmp_path: Path, recipe: str) -> None:
    source = tmp_path / "source"
    save_tiny("opt", source)
    fields = {name: value for name, value in QUICK.items() if name != "group_size"}
    plan = make_plan(open_source(str(source)), Recipe.load(recipe, fields))
    report = run(plan, tmp_path / "out")
    assert report.size.quantized_bytes == plan.quantized_bytes
    assert all(0 < layer.weight_error < 1 for layer in report.layers)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_calibration_lowers_the_output_error(tmp_path: Path) -> None:
    """On the calibration inputs of one model, the solver beats its own fit without sweep and refinement."""
    source = tmp_path / "source"
    save_tiny("llama", source)
    full = quantize(source, tmp_path / "full")
    plain = quantize(source, tmp_path / "plain", sweep="none", refine_rounds=0)
    for ours, theirs in zip(full.layers, plain.layers, strict=True):
        if ours.block == 0:  # later blocks see different inputs
            assert ours.output_error is not None
            assert theirs.output_error is not None
            assert ours.output_error < theirs.output_error


def test_report_accounts_for_every_byte_written(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_tiny("qwen2", source)
    out = tmp_path / "out"
    report = quantize(source, out)
    written = json.loads((out / "report.json").read_text())
    files = list(out.glob("*.safetensors"))
    assert report.size.files_bytes == sum(file.stat().st_size for file in files)
    assert {file.name: file.stat().st_size for file in files} == {
        name: entry["bytes"] for name, entry in written["files"].items()
    }
    assert written["recipe"] == Recipe.load("default", QUICK).model_dump(mode="json")
    assert written["calibration"]["tokens"] == QUICK["samples"] * QUICK["seq_len"]
    assert [layer["name"] for layer in written["layers"]] == [layer.name for layer in report.layers]


def test_blocks_are_released_after_their_turn(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_tiny("llama", source)
    opened = open_source(str(source))
    plan = make_plan(opened, Recipe.load("default", QUICK))
    loaded: list[int] = []

    def watch(names: Sequence[str], text: str) -> Iterator[str]:
        for name in names:
            if text == "Quantizing":
                loaded.append(sum(p.numel() for p in opened.skeleton().parameters() if not p.is_meta))
            yield name

    Job(plan, tmp_path / "out", Context(CPU, progress=watch)).run()
    assert loaded == [0] * len(plan.structure.blocks)


def test_layer_with_a_non_finite_weight_is_named(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_tiny("llama", source)
    model = AutoModelForCausalLM.from_pretrained(source)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    model.save_pretrained(source)
    with pytest.raises(
        NumericalError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds values that are not finite"
    ):
        quantize(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("recipe", ["default", "rtn"])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.input_layernorm.weight"])
def test_kept_tensors_must_be_finite(tmp_path: Path, name: str, recipe: str) -> None:
    source = save_tiny("llama", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors[name][3] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericalError, match=rf"{re.escape(name)} holds values that are not finite"):
        quantize(source, tmp_path / "out", recipe)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_kept_tensors_must_be_finite_in_the_written_dtype(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = 7e4
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    plan = make_plan(open_source(str(source), dtype="float16"), Recipe.load("rtn", {"dtype": "float16"}))
    with pytest.raises(NumericalError, match=r"model\.norm\.weight .*not finite in float16; give `dtype` bfloat16"):
        run(plan, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    quantize(source, tmp_path / "out", "rtn")
    verify(Artifact.open(tmp_path / "out"))


def test_embedding_at_16_bits_must_be_finite(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"][300, 3] = float("inf")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericalError, match=r"model\.embed_tokens\.weight .*not finite"):
        quantize(source, tmp_path / "out", "rtn", embedding_bits=16)


def test_report_lists_unread_tensors(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    file = source / "model.safetensors"
    save_file(load_file(file) | {"tower.blocks.0.weight": torch.ones(6, 5)}, file, metadata={"format": "pt"})
    report = quantize(source, tmp_path / "out", "rtn")
    written = json.loads((tmp_path / "out" / "report.json").read_text())["source"]["left_behind"]
    reason = "no part of LlamaForCausalLM"
    assert written == [{"part": "tower", "tensors": 1, "nbytes": 120, "reason": reason}]
    assert f"Not read      tower (1 tensor, 120 B, {reason})" in summarize(report, "out")


def test_block_with_non_finite_activations_is_named(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_tiny("llama", source)
    model = AutoModelForCausalLM.from_pretrained(source)
    model.model.layers[0].post_attention_layernorm.weight.data[:] = 3e38
    model.save_pretrained(source)
    with pytest.raises(NumericalError, match=r"output of model\.layers\.0 is not finite in float32"):
        quantize(source, tmp_path / "out")


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("fields", [{"asymmetric": 0.0}, {"loss_aware": 1.0}, {"reconstruct_epochs": 1}], ids=str)
def test_every_way_to_calibrate_writes_a_loadable_checkpoint(
    tmp_path: Path, family: str, fields: dict[str, Any]
) -> None:
    source = tmp_path / "source"
    save_tiny(family, source)
    report = quantize(source, tmp_path / "out", **fields)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(logits(packed, tokens)).all()
    depth = len({layer.block for layer in report.layers})
    assert len(report.blocks) == (depth if "reconstruct_epochs" in fields else 0)
    plain = quantize(source, tmp_path / "plain")
    # Blocks that do not improve on the held-out text keep their bytes.
    changed = any(block.kept for block in report.blocks) or "reconstruct_epochs" not in fields
    assert (file_sum(tmp_path / "out") != file_sum(tmp_path / "plain")) == changed
    assert report.size == plain.size


@pytest.mark.parametrize("fields", [{}, {"reconstruct_epochs": 1, "distill_epochs": 1}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dtype_without_hardware_support_is_stored_but_not_computed_in(
    tmp_path: Path, family: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is that of the same weights in float32, up to the rounding of norms and biases to 16 bits."""
    save_tiny(family, tmp_path / "half", dtype=torch.bfloat16)
    AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32).save_pretrained(tmp_path / "single")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "single" / name).write_bytes((tmp_path / "half" / name).read_bytes())
    monkeypatch.setattr(source_model, "computes_in", lambda _, dtype: dtype == torch.float32)
    reports = {name: quantize(tmp_path / name, tmp_path / f"{name}-out", **fields) for name in ("half", "single")}
    assert reports["half"].source.dtype == "bfloat16"
    assert {report.machine.dtype for report in reports.values()} == {"float32"}
    half, single = (load_file(tmp_path / f"{name}-out" / "model.safetensors") for name in reports)
    assert half.keys() == single.keys()
    for name, tensor in half.items():
        single_tensor = single[name]
        assert tensor.dtype == (torch.bfloat16 if single_tensor.dtype == torch.float32 else single_tensor.dtype)
        if not fields and family == "llama":
            # Norms are unchanged. In GPT-2, biases are corrected and then rounded, which affects the next block.
            assert torch.equal(tensor, single_tensor.to(tensor.dtype))
    errors = [[layer.weight_error for layer in report.layers] for report in reports.values()]
    assert errors[0] == pytest.approx(errors[1], rel=0.15)


def test_tuned_norms_are_written(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_tiny("llama", source)
    fields: dict[str, Any] = {"samples": 32, "seq_len": 64, "bits": 2, "asymmetric": 0.0, "drift": 0.0}
    report = quantize(source, tmp_path / "out", reconstruct_epochs=8, **fields)
    assert any(block.kept for block in report.blocks)
    original = AutoModelForCausalLM.from_pretrained(source)
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for depth, block in enumerate(report.blocks):
        norms = [model.model.layers[depth].input_layernorm.weight for model in (original, tuned)]
        assert torch.equal(*norms) != block.kept


@pytest.mark.parametrize("fields", [{}, {"reconstruct_epochs": 1}, {"true_sequential": False}], ids=str)
def test_whole_block_may_be_skipped(tmp_path: Path, fields: dict[str, Any]) -> None:
    source = tmp_path / "source"
    save_tiny("llama", source)
    report = quantize(source, tmp_path / "out", skip=("model.layers.0",), **fields)
    assert {layer.block for layer in report.layers} == {1}
    assert [block.name for block in report.blocks] == (["model.layers.1"] if "reconstruct_epochs" in fields else [])
    original = AutoModelForCausalLM.from_pretrained(source).state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict().items():
        if name.startswith("model.layers.0."):
            assert torch.equal(tensor, original[name])
