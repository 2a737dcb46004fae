"""Compressed checkpoints in transformers' own loading and saving, compared with dense models of the decoded weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import COMMON, FORMATS, Checkpoint, edit_config, write_checkpoint
from formats import matrix_format
from loading import IDS, assert_close, assert_same_state, load, logits
from tiny_models import FAMILIES, MIXTURES, tiny_model
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shiftadd_cli.artifact.format import SUFFIXES
from shiftadd_cli.errors import ArtifactError
from shiftadd_cli.runtime.linear import PackedLinear
from shiftadd_cli.runtime.transformers_plugin import register

ACC = matrix_format(bits=2, group_size=1, group_rows="all", scale_format="apot3", row_scale=True, offset=False)
LAT = matrix_format(bits=3, group_size=8, group_rows="1/8", scale_format="pot", row_scale=False, offset=False)
FLOAT = matrix_format(
    bits=1, group_size=7, group_rows=3, scale_format="float", row_scale=True, offset=True, rotation="hadamard"
)
OFFSET = matrix_format(
    bits=4, group_size=24, group_rows=1, scale_format="pot", row_scale=True, offset=True, rotation="hadamard"
)


SHIFT1 = COMMON.replaced(primitive="shift1", bits=3)
SHIFT2 = COMMON.replaced(primitive="shift2", bits=5, rotation="hadamard")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """One checkpoint per family, which mixes the formats of the paper, offsets and several bit widths."""
    own = {"q_proj": ACC, "o_proj": LAT, "out_proj": LAT, "k_proj": FLOAT, "c_fc": FLOAT, "down_proj": OFFSET,
           "fc2": OFFSET, "mlp.c_proj": OFFSET, "dense_4h_to_h": ACC}  # fmt: skip
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: write_checkpoint(tiny_model(name), folder / name, own=own) for name in FAMILIES + MIXTURES}


def in_dtype(model: Any, dtype: torch.dtype) -> PreTrainedModel:
    """`model.to(dtype)`, which transformers decorates in a way that mypy does not understand."""
    return model.to(dtype)


def generate(model: Any) -> torch.Tensor:
    return model.generate(IDS, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(IDS))


@pytest.mark.parametrize("family", FAMILIES + MIXTURES)
def test_loaded_model_computes_with_the_decoded_weights(checkpoints: dict[str, Checkpoint], family: str) -> None:
    folder, dense = checkpoints[family]
    model = load(folder)
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert len(packed) >= 8
    assert_close(logits(model), logits(dense))
    assert not any(module.get_parameter(name).requires_grad for module in packed for name in module.layout.tensors())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_shift_layers_beside_planes_compute_with_the_decoded_weights(
    family: str, kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHIFTADD_KERNEL", kernel)
    own = {"q_proj": SHIFT1, "down_proj": SHIFT2, "c_attn": SHIFT2, "c_fc": SHIFT1}
    folder, dense = write_checkpoint(tiny_model(family), tmp_path / "out", own=own)
    model = load(folder)
    primitives = {module.layout.format.primitive for module in model.modules() if isinstance(module, PackedLinear)}
    assert primitives == {"bcq", "shift1", "shift2"}
    assert_close(logits(model), logits(dense))
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert_same_state(model, again)
    assert torch.equal(logits(model), logits(again))
    assert_close(logits(load(folder).dequantize()), logits(dense))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", *MIXTURES])
def test_resaved_model_reloads_equal(checkpoints: dict[str, Checkpoint], family: str, tmp_path: Path) -> None:
    model = load(checkpoints[family].folder)
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    again = load(tmp_path / "again")
    assert_same_state(model, again)
    assert torch.equal(logits(model), logits(again))
    assert model.config.quantization_config.to_dict() == again.config.quantization_config.to_dict()


@pytest.mark.parametrize("family", MIXTURES)
def test_dequantized_mixture_has_the_layout_of_transformers(
    checkpoints: dict[str, Checkpoint], family: str, tmp_path: Path
) -> None:
    folder, dense = checkpoints[family]
    plain = load(folder).dequantize()
    assert plain.state_dict().keys() == tiny_model(family).state_dict().keys()
    assert_close(logits(plain), logits(dense))
    plain.save_pretrained(tmp_path / "plain")
    assert_same_state(load(tmp_path / "plain"), plain)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_stacked_experts_stay_stacked(family: str, tmp_path: Path) -> None:
    folder, dense = write_checkpoint(tiny_model(family), tmp_path / "out", split=False)
    model = load(folder)
    assert any(tensor.ndim == 3 for tensor in model.state_dict().values() if tensor.is_floating_point())
    assert_close(logits(model), logits(dense))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_load_dtype_leaves_stored_tensors_alone(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    common = matrix_format(3, 16, 1, form, True, True)
    folder, dense = write_checkpoint(tiny_model("opt"), tmp_path / "out", common=common)
    reference, model = load(folder, dtype=torch.float32), load(folder, dtype=dtype)
    assert model.dtype == dtype
    left, right = reference.state_dict(), model.state_dict()
    stored = [name for name in left if name.endswith(SUFFIXES)]
    assert stored
    for name in stored:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name], right[name])
    assert_close(logits(model), logits(dense), eps=0.02)
    moved = in_dtype(reference, dtype)
    assert_same_state(moved, model)
    # Saved at half precision, the model still stands for the same matrices.
    moved.save_pretrained(tmp_path / "half")
    assert_same_state(load(tmp_path / "half"), model)


def test_modules_kept_in_float32_do_not_widen_stored_tensors(
    checkpoints: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import OPTForCausalLM

    monkeypatch.setattr(OPTForCausalLM, "_keep_in_fp32_modules_strict", {"fc1", "fc2"})
    model = load(checkpoints["opt"].folder, dtype=torch.bfloat16)
    layer = model.model.decoder.layers[0].fc1
    assert layer.bias.dtype == torch.float32
    for name, (_, dtype) in layer.layout.tensors().items():
        assert layer.get_parameter(name).dtype == dtype


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_maps_do_not_change_the_logits(
    checkpoints: dict[str, Checkpoint], device_map: str | dict[str, str]
) -> None:
    folder, dense = checkpoints["llama"]
    assert_close(logits(load(folder, device_map=device_map)), logits(dense))


def test_offloaded_model_computes_but_cannot_be_dequantized(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    folder, dense = checkpoints["llama"]
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
                  "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    model = load(folder, device_map=device_map, offload_folder=tmp_path)
    assert_close(logits(model), logits(dense))
    with pytest.raises(ArtifactError, match=r"model\.layers\.1\.self_attn\.\w+ is offloaded"):
        model.dequantize()


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_dequantized_model_is_the_dense_model(checkpoints: dict[str, Checkpoint], family: str, tmp_path: Path) -> None:
    folder, dense = checkpoints[family]
    model = load(folder).dequantize()
    assert_same_state(model, dense)
    assert [type(module) for module in model.modules()] == [type(module) for module in dense.modules()]
    model.save_pretrained(tmp_path / "dense")
    plain = load(tmp_path / "dense")
    assert not hasattr(plain.config, "quantization_config")
    assert torch.equal(logits(plain), logits(dense))


def test_dequantized_gpt2_has_its_own_kind_of_linear(checkpoints: dict[str, Checkpoint]) -> None:
    model = load(checkpoints["gpt2"].folder).dequantize(torch.bfloat16)
    layer = model.transformer.h[0].mlp.c_fc
    assert type(layer) is Conv1D
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16


def test_generated_tokens_are_those_of_the_dense_model(checkpoints: dict[str, Checkpoint]) -> None:
    folder, dense = checkpoints["llama"]
    assert torch.equal(generate(load(folder)), generate(dense))


def test_body_loads_alone_and_with_another_head(checkpoints: dict[str, Checkpoint]) -> None:
    folder, dense = checkpoints["llama"]
    body = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        assert_close(body(IDS).last_hidden_state, dense.model(IDS).last_hidden_state)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    with torch.no_grad():
        assert_close(classifier.model(IDS).last_hidden_state, dense.model(IDS).last_hidden_state)


def test_unknown_keys_are_kept(tmp_path: Path) -> None:
    folder, dense = write_checkpoint(tiny_model("llama"), tmp_path / "out")
    edit_config(folder, written_by="the future", nested={"a": [1, None]})
    model = load(folder)
    assert_close(logits(model), logits(dense))
    model.save_pretrained(tmp_path / "again")
    assert load(tmp_path / "again").config.quantization_config.written_by == "the future"


def test_registering_twice_changes_nothing() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    before = AUTO_QUANTIZER_MAPPING["shiftadd"], AUTO_QUANTIZATION_CONFIG_MAPPING["shiftadd"]
    register()
    assert (AUTO_QUANTIZER_MAPPING["shiftadd"], AUTO_QUANTIZATION_CONFIG_MAPPING["shiftadd"]) == before


def test_uncompressed_model_with_our_configuration_is_refused(tmp_path: Path) -> None:
    from shiftadd_cli.runtime.transformers_plugin import ShiftAddConfig

    tiny_model("llama").save_pretrained(tmp_path)
    config = ShiftAddConfig(format_version=1, modules={}, **vars(COMMON))
    with pytest.raises(ValueError, match="pre-quantized"):
        load(tmp_path, quantization_config=config)


MODULE = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 7}, "format_version 7, and this shiftadd reads up to 6; upgrade it"),
        ({"bits": None}, "lacks 'bits'"),
        ({"modules": {"model.layers.7.mlp.up_proj": {"shape": [100, 48]}}}, "layers.7.mlp.up_proj .* no such module"),
        ({"modules": {"model.norm": {"shape": [48, 48]}}}, "model.norm .* is a LlamaRMSNorm"),
        ({"modules": {MODULE: {"shape": [48, 100]}}}, f"{MODULE} is 100 x 48 by .* but 48 x 100"),
        ({"modules": {MODULE: {"shape": [100, 48], "bits": 2}}}, f"{MODULE}.weight_codes in .* has shape"),
    ],
)
def test_mismatched_configurations_are_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    folder, _ = write_checkpoint(tiny_model("llama"), tmp_path / "out")
    edit_config(folder, **changes)
    with pytest.raises(ArtifactError, match=message):
        load(folder)


def test_good_checkpoint_loads_silently(checkpoints: dict[str, Checkpoint], capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(checkpoints["gpt2"].folder)
    assert "MISSING" not in capfd.readouterr().err


def test_replaced_modules_are_exactly_the_listed_ones(tmp_path: Path) -> None:
    folder, _ = write_checkpoint(tiny_model("opt"), tmp_path / "out")
    model = load(folder)
    listed = set(model.config.quantization_config.layouts())
    assert {name for name, module in model.named_modules() if isinstance(module, PackedLinear)} == listed
    assert {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} == {"lm_head"}
