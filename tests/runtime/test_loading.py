"""Damaged checkpoints are refused on loading with the tensor's name, and never filled with random values."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import COMMON, Checkpoint, edit_config, edit_tensors, write_checkpoint
from loading import IDS, assert_close, assert_same_state, load, logits
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, VOCAB_SIZE, tiny_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from shiftadd_cli.artifact.folder import Artifact
from shiftadd_cli.artifact.verify import verify
from shiftadd_cli.bcq.matrix_format import MatrixFormat
from shiftadd_cli.errors import ArtifactError
from shiftadd_cli.runtime.table import PackedTable, Table
from shiftadd_cli.runtime.transformers_plugin import register

register()
CODES = "model.decoder.layers.0.fc1.weight_codes"
SCALE = "model.decoder.layers.1.self_attn.q_proj.weight_row_scale"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tiny_model("opt"), tmp_path / "out", shard_bytes=10**9).folder


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (CODES, None, f"lacks the tensor {CODES}"),
        (SCALE, None, f"lacks the tensor {SCALE}"),
        ("model.decoder.layers.0.fc1.bias", None, r"lacks the tensor model\.decoder\.layers\.0\.fc1\.bias"),
        ("model.decoder.final_layer_norm.weight", None, r"lacks the tensor model\.decoder\.final_layer_norm\.weight"),
        (CODES, torch.zeros(92, 3, 6, dtype=torch.uint8), rf"{CODES} .* \[92, 3, 6\], but .* \[92, 3, 5\]"),
        (CODES, torch.zeros(92, 3, 5), f"{CODES} .* is torch.float32, and the format says torch.uint8"),
        (SCALE, torch.ones(40), f"{SCALE} .* is torch.float32, and the format says torch.bfloat16"),
        ("model.decoder.final_layer_norm.weight", torch.ones(41), r"final_layer_norm\.weight .* \[41\]"),
    ],
)
def test_missing_and_misshapen_tensors_are_named(
    folder: Path, name: str, value: torch.Tensor | None, message: str
) -> None:
    edit_tensors(folder, {name: value})
    with pytest.raises(ArtifactError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


SCALES = "model.decoder.layers.0.fc1.weight_row_scale"


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_non_finite_scales_are_named(folder: Path, value: float) -> None:
    scales = load_file(folder / "model.safetensors")[SCALES].clone()
    scales[-1] = value
    edit_tensors(folder, {SCALES: scales})
    with pytest.raises(ArtifactError, match=f"{SCALES} holds values that are not finite"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_non_finite_scales_of_a_table_are_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tiny_model("llama"), tmp_path / "out", shard_bytes=10**9, tables=True).folder
    name = "model.embed_tokens.weight_int8_scale"
    edit_tensors(folder, {name: torch.full_like(load_file(folder / "model.safetensors")[name], torch.nan)})
    with pytest.raises(ArtifactError, match=f"{name} holds values that are not finite"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("ids", [[40, 41], [-1, 3], [3, 3], [5, 4], [0, 2**31 - 1]])
def test_invalid_outlier_columns_are_never_read(tmp_path: Path, ids: list[int]) -> None:
    common = COMMON.replaced(outlier_columns=0.05)
    folder = write_checkpoint(tiny_model("opt"), tmp_path / "out", shard_bytes=10**9, common=common).folder
    name = "model.decoder.layers.0.fc1.weight_column_ids"
    assert load_file(folder / "model.safetensors")[name].shape == (len(ids),)
    edit_tensors(folder, {name: torch.tensor(ids, dtype=torch.int32)})
    with pytest.raises(ArtifactError, match=f"{name} names columns that are not there"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_index_that_leaves_its_folder_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tiny_model("opt"), tmp_path / "out").folder
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = min(index["weight_map"].values())
    (folder / file).rename(tmp_path / file)
    index["weight_map"] = {
        name: f"../{file}" if shard == file else shard for name, shard in index["weight_map"].items()
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match="outside its folder"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_truncated_file_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"model\.safetensors is truncated or damaged"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match="not a safetensors file"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_names_without_the_prefix_of_the_body_load(folder: Path) -> None:
    """transformers adds or removes `model.` on loading, which the checks must not mistake for missing tensors."""
    path = folder / "model.safetensors"
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    tensors = {name.removeprefix("model."): tensor.clone() for name, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(expected[name], state[name]) for name in expected)


TIED = ("qwen2", "qwen3", "gemma3", "opt", "gpt2", "bloom")
UNTIED = ("llama", "mistral", "phi")


FORMS: dict[str, bool | MatrixFormat] = {
    "8-bit rows": True,
    "planes": COMMON.replaced(bits=4, offset=True, outlier_columns=0.05),
    "trellis": COMMON.replaced(primitive="trellis1", group_size="all", rotation="hadamard"),
}


@pytest.fixture(scope="module", params=FORMS)
def checkpoints(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    folder, form = tmp_path_factory.mktemp("checkpoints"), FORMS[request.param]
    return {name: write_checkpoint(tiny_model(name), folder / name, tables=form) for name in FAMILIES}


def ends(model: PreTrainedModel) -> tuple[Table, Table]:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, Table)
    assert isinstance(head, Table)
    assert embedding.suffixes == head.suffixes
    return embedding, head


def in_dtype(model: Any, dtype: torch.dtype) -> PreTrainedModel:
    """`model.to(dtype)`, which transformers decorates in a way that mypy does not understand."""
    return model.to(dtype)


def generate(model: Any) -> torch.Tensor:
    return model.generate(IDS, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(IDS))


def is_one_table(model: PreTrainedModel) -> bool:
    embedding, head = ends(model)
    same = [getattr(embedding, name) is getattr(head, name) for name in embedding.suffixes]
    if isinstance(embedding, PackedTable):
        # Nor is there a second copy of what the kernels read.
        same.append(embedding.words.data_ptr() == getattr(head, "words").data_ptr())  # noqa: B009
    assert len(set(same)) == 1
    return same[0]


def test_families_include_tied_and_untied_embeddings() -> None:
    assert {*TIED, *UNTIED} == {*FAMILIES}
    for family in FAMILIES:
        assert bool(tiny_model(family).all_tied_weights_keys) == (family in TIED)


@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_model_computes_with_the_decoded_rows(checkpoints: dict[str, Checkpoint], family: str) -> None:
    folder, dense = checkpoints[family]
    model = load(folder)
    assert is_one_table(model) == (family in TIED)
    assert isinstance(model.get_input_embeddings(), type(dense.get_input_embeddings()))
    assert_close(logits(model), logits(dense))
    assert model.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in ends(model)[0].parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_resaved_model_reloads_equal(checkpoints: dict[str, Checkpoint], family: str, tmp_path: Path) -> None:
    model = load(checkpoints[family].folder)
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    verify(Artifact.open(tmp_path / "again"))
    again = load(tmp_path / "again")
    assert is_one_table(again) == (family in TIED)
    assert_same_state(model, again)
    assert torch.equal(logits(model), logits(again))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "phi"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_load_dtype_leaves_stored_tensors_alone(
    checkpoints: dict[str, Checkpoint], family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder, dense = checkpoints[family]
    model, moved = load(folder, dtype=dtype), in_dtype(load(folder, dtype=torch.float32), dtype)
    assert model.dtype == moved.dtype == dtype
    assert_same_state(model, moved)
    assert is_one_table(model) == is_one_table(moved) == (family in TIED)
    exact, rounded = logits(dense), logits(in_dtype(copy.deepcopy(dense), dtype)).float()
    # Kernels sum in another order and may round in other places, but not much more than the dense model does.
    assert (logits(model).float() - exact).abs().max() <= 2 * (rounded - exact).abs().max()
    model.save_pretrained(tmp_path / "half")
    assert_same_state(load(tmp_path / "half", dtype=dtype), model)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_maps_do_not_change_the_logits(
    checkpoints: dict[str, Checkpoint], family: str, device_map: str | dict[str, str]
) -> None:
    folder, dense = checkpoints[family]
    assert_close(logits(load(folder, device_map=device_map)), logits(dense))


# transformers itself cannot load a dense model with only one of two tied modules on disk.
@pytest.mark.parametrize(
    ("family", "offloaded"),
    [("llama", "model.embed_tokens"), ("llama", "lm_head"), ("llama", "both"), ("qwen2", "both")],
)
def test_offloaded_model_computes_but_cannot_be_dequantized(
    checkpoints: dict[str, Checkpoint], family: str, offloaded: str, tmp_path: Path
) -> None:
    folder, dense = checkpoints[family]
    device_map = dict.fromkeys(
        ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
    )
    for name in ("model.embed_tokens", "lm_head") if offloaded == "both" else (offloaded,):
        device_map[name] = "disk"
    model = load(folder, device_map=device_map, offload_folder=tmp_path)
    assert_close(logits(model), logits(dense))
    with pytest.raises(ArtifactError, match="is offloaded"):
        model.dequantize()


@pytest.mark.parametrize("family", FAMILIES)
def test_dequantized_model_is_the_dense_model(checkpoints: dict[str, Checkpoint], family: str, tmp_path: Path) -> None:
    folder, dense = checkpoints[family]
    model = load(folder).dequantize()
    assert_same_state(model, dense)
    assert [type(module) for module in model.modules()] == [type(module) for module in dense.modules()]
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (family in TIED)
    assert model.all_tied_weights_keys == dense.all_tied_weights_keys
    model.tie_weights()
    assert_close(logits(model), logits(dense))
    model.save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(load(tmp_path / "dense")), logits(model))


def test_model_with_a_device_map_can_be_dequantized(checkpoints: dict[str, Checkpoint]) -> None:
    folder, dense = checkpoints["gemma3"]
    model = load(folder, device_map={"": "cpu"}).dequantize(torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} <= {torch.bfloat16, torch.float32}
    assert model.get_output_embeddings().weight.dtype == torch.bfloat16
    assert_close(logits(model.float()), logits(dense), eps=0.03)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_generated_tokens_are_those_of_the_dense_model(checkpoints: dict[str, Checkpoint], family: str) -> None:
    folder, dense = checkpoints[family]
    assert torch.equal(generate(load(folder)), generate(dense))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt"])
def test_body_loads_alone_and_with_another_head(checkpoints: dict[str, Checkpoint], family: str) -> None:
    folder, dense = checkpoints[family]
    with torch.no_grad():
        expected = dense.base_model(IDS).last_hidden_state
        assert_close(AutoModel.from_pretrained(folder)(IDS).last_hidden_state, expected)
        classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
        assert_close(classifier.base_model(IDS).last_hidden_state, expected)
    assert isinstance(classifier.get_input_embeddings(), Table)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_resizing_is_refused_until_dequantized(checkpoints: dict[str, Checkpoint], family: str) -> None:
    folder, dense = checkpoints[family]
    model = load(folder)
    with pytest.raises(ArtifactError, match="dequantize"):
        model.resize_token_embeddings(VOCAB_SIZE + 8)
    model.dequantize().resize_token_embeddings(VOCAB_SIZE + 8, mean_resizing=False)
    assert_close(logits(model)[..., :VOCAB_SIZE], logits(dense))


def test_model_tied_again_keeps_one_table(checkpoints: dict[str, Checkpoint]) -> None:
    model = load(checkpoints["qwen2"].folder)
    expected = logits(model)
    model.tie_weights()
    assert is_one_table(model)
    assert torch.equal(logits(model), expected)


def test_checkpoint_without_tables_loads_dense_embeddings(tmp_path: Path) -> None:
    folder, dense = write_checkpoint(tiny_model("qwen2"), tmp_path / "out")
    model = load(folder)
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert type(model.get_output_embeddings()) is nn.Linear
    assert_close(logits(model), logits(dense))


def test_good_checkpoint_loads_silently(checkpoints: dict[str, Checkpoint], capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for family in ("gpt2", "gemma3", "phi"):
            load(checkpoints[family].folder)
    errors = capfd.readouterr().err
    assert "MISSING" not in errors
    assert "UNEXPECTED" not in errors


EMBED, HEAD = "model.embed_tokens", "lm_head"


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (f"{EMBED}.weight_int8", None, r"lacks the tensor model\.embed_tokens\.weight_int8"),
        (f"{EMBED}.weight_int8_scale", None, r"lacks the tensor model\.embed_tokens\.weight_int8_scale"),
        (f"{EMBED}.weight_int8", torch.zeros(320, 8, dtype=torch.int8), r"weight_int8 .* has shape \[320, 8\]"),
        (f"{EMBED}.weight_int8_scale", torch.ones(320), "weight_int8_scale .* is torch.float32, and the format says"),
    ],
)
def test_damaged_tables_are_refused(
    tmp_path: Path, family: str, name: str, value: torch.Tensor | None, message: str
) -> None:
    folder, _ = write_checkpoint(tiny_model(family), tmp_path / "out", tables=True, shard_bytes=10**9)
    edit_tensors(folder, {name: value})
    with pytest.raises(ArtifactError, match=message):
        load(folder)


def test_separate_table_of_a_tied_head_is_refused(tmp_path: Path) -> None:
    folder, _ = write_checkpoint(tiny_model("qwen2"), tmp_path / "out", tables=True, shard_bytes=10**9)
    edit_tensors(folder, {"lm_head.weight_int8": torch.ones(320, 32, dtype=torch.int8)})
    with pytest.raises(ArtifactError, match=r"lm_head\.weight_int8, which its config\.json ties to another table"):
        load(folder)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"model.embed": {"shape": [320, 48]}}, r"model\.embed .* no such module"),
        ({EMBED: {"shape": [48, 320]}}, "is 320 x 48 by .* but 48 x 320"),
        ({"model.norm": {"shape": [48, 48]}}, r"model\.norm is listed as a table, but is a LlamaRMSNorm"),
        ({EMBED: {"shape": [320]}}, "gives no shape for model.embed_tokens"),
    ],
)
def test_mismatched_lists_of_tables_are_refused(tmp_path: Path, tables: dict[str, object], message: str) -> None:
    folder, _ = write_checkpoint(tiny_model("llama"), tmp_path / "out", tables=True)
    edit_config(folder, tables=tables)
    with pytest.raises(ArtifactError, match=message):
        load(folder)
