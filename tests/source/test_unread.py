"""Tensors that a checkpoint holds and the model does not read."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny, save_tiny_gguf, tiny_model
from tiny_vision import tiny_vision_model, write_processor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from shiftadd_cli.errors import SourceError
from shiftadd_cli.source import open_source
from shiftadd_cli.source.unread import LeftBehind


def _add(folder: Path, extra: dict[str, torch.Tensor]) -> str:
    file = folder / "model.safetensors"
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    return str(folder)


def _configure(folder: Path, **settings: object) -> str:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return str(folder)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.q_proj.bias",
        "model.layers.0.mlp.down_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.mlp.gate_prj.weight",
        "model.layers.0.post_feedforward_layernorm.weight",
        "model.layers.0.scale",
        "model.norm.bias",
        "model.embed_tokens.scale",
        "lm_head.bias",
    ],
)
def test_unread_tensor_of_a_model_module_is_refused(name: str, tmp_path: Path) -> None:
    spec = _add(save_tiny("llama", tmp_path), {name: torch.ones(4)})
    with pytest.raises(SourceError, match="does not read") as caught:
        open_source(spec)
    assert name in str(caught.value)


def test_biases_excluded_by_the_configuration_are_named_and_counted(tmp_path: Path) -> None:
    extra = {f"model.layers.{i}.self_attn.{p}_proj.bias": torch.ones(4) for i in (0, 1) for p in "qkv"}
    with pytest.raises(SourceError, match=r"holds 6 tensors .*layers\.0\.self_attn\.k_proj\.bias, .* and 3 more"):
        open_source(_add(save_tiny("llama", tmp_path), extra))


def test_tensors_without_a_part_of_the_model_are_left_behind_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extra = {
        "some.nonsense": torch.ones(7, 9),
        "some.more.weight": torch.ones(2),
        "v_head.weight": torch.ones(3).half(),
    }
    spec = _add(save_tiny("llama", tmp_path), extra)
    with caplog.at_level(logging.WARNING, "shiftadd_cli"):
        source = open_source(spec)
    reason = "no part of LlamaForCausalLM"
    assert source.left_behind == (LeftBehind("some", 2, 4 * 65, reason), LeftBehind("v_head", 1, 6, reason))
    (record,) = caplog.records
    assert "some (2 tensors, 260 B, no part of LlamaForCausalLM); v_head (1 tensor, 6 B" in record.getMessage()


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("gpt2", "transformer.h.0.attn.bias"),
        ("gpt2", "transformer.h.0.attn.masked_bias"),
        ("llama", "model.embed_tokens.position_ids"),
    ],
)
def test_buffers_of_older_versions_pass_silently(
    family: str, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_source(_add(save_tiny(family, tmp_path), {name: torch.ones(4)}))
    assert source.left_behind == ()
    assert not [record for record in caplog.records if record.name.startswith("shiftadd_cli")]


def test_layers_beyond_the_configuration_are_reported(tmp_path: Path) -> None:
    save_tiny("qwen3", tmp_path)
    spec = _configure(tmp_path, num_hidden_layers=2, layer_types=["full_attention"] * 2)
    (behind,) = open_source(spec).left_behind
    assert (behind.part, behind.reason) == ("model.layers.2", "beyond the 2 layers of the configuration")
    stored = load_file(tmp_path / "model.safetensors")
    assert behind.nbytes == sum(t.nbytes for name, t in stored.items() if ".layers.2." in name)


def _deepseek(folder: Path) -> dict[str, torch.Tensor]:
    config = AutoConfig.for_model(
        "deepseek_v3", vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, num_experts_per_tok=2, intermediate_size=40, moe_intermediate_size=20,
        n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, n_shared_experts=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def test_prediction_layers_are_left_behind_and_dropped_from_the_configuration(tmp_path: Path) -> None:
    """DeepSeek stores them as one more layer, with tensors that no other layer has."""
    own = _deepseek(tmp_path)
    extra = {name.replace("layers.1.", "layers.2."): value for name, value in own.items() if "layers.1." in name}
    extra["model.layers.2.eh_proj.weight"] = torch.ones(32, 64)
    _configure(tmp_path, num_nextn_predict_layers=1)
    source = open_source(_add(tmp_path, extra))
    (behind,) = source.left_behind
    assert behind == LeftBehind(
        "model.layers.2", len(extra), sum(t.nbytes for t in extra.values()), "for predicting several tokens at once"
    )
    assert source.config.num_nextn_predict_layers == 0


def test_prediction_part_beside_the_layers_is_left_behind(tmp_path: Path) -> None:
    source = open_source(_add(save_tiny("llama", tmp_path), {"mtp.layers.0.mlp.up_proj.weight": torch.ones(3, 3)}))
    assert source.left_behind == (LeftBehind("mtp", 1, 36, "for predicting several tokens at once"),)


def test_configuration_stays_if_its_prediction_layers_are_not_stored(tmp_path: Path) -> None:
    _deepseek(tmp_path)
    assert open_source(_configure(tmp_path, num_nextn_predict_layers=1)).config.num_nextn_predict_layers == 1


def test_unread_tower_is_reported(tmp_path: Path) -> None:
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    text = {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
        "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64,
        "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2],
                            "partial_rotary_factor": 1.0},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 14,
              "out_hidden_size": 32, "num_position_embeddings": 16}  # fmt: skip
    model = Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision))
    model.save_pretrained(tmp_path)
    tower = [value for name, value in model.named_parameters() if name.startswith("model.visual.")]
    (behind,) = open_source(str(tmp_path)).left_behind
    assert behind.part == "model.visual"
    assert behind.tensors == len(tower)
    assert behind.nbytes == sum(parameter.numel() * 4 for parameter in tower)


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.q_proj.lora_A.weight", "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"],
)
def test_adapter_must_be_merged_first(name: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"1 tensors of an adapter .*merge it into its base model"):
        open_source(_add(save_tiny("llama", tmp_path), {name: torch.ones(4, 4)}))


def test_adapter_around_its_base_is_recognized(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    weight = "model.layers.0.mlp.up_proj"
    stored[f"{weight}.base_layer.weight"] = stored.pop(f"{weight}.weight")
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match="of an adapter"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("part", "renamed"), [("_orig_mod", "_orig_mod.{}"), ("module", "module.{}"), ("_orig_mod", "model._orig_mod.{}")]
)
def test_prefix_left_by_a_wrapper_is_named(part: str, renamed: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    save_file({renamed.format(name): value for name, value in stored.items()}, tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match=f"contain '{part}'"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(("name", "refused"), [("h.1.attn.bias", False), ("h.1.attn.q_norm.weight", True)])
def test_names_may_lack_the_prefix_of_the_main_part(name: str, refused: bool, tmp_path: Path) -> None:
    """GPT-2 is stored this way on the hub."""
    transformer = tiny_model("gpt2").get_submodule("transformer")
    assert isinstance(transformer, PreTrainedModel)
    transformer.save_pretrained(tmp_path)
    spec = _add(tmp_path, {name: torch.ones(4)})
    if refused:
        with pytest.raises(SourceError, match=name):
            open_source(spec)
    else:
        assert open_source(spec).left_behind == ()


def test_bare_model_may_have_the_prefix_of_the_main_part(tmp_path: Path) -> None:
    tiny_vision_model("vit-bare").save_pretrained(tmp_path)
    write_processor(tmp_path)
    stored = {f"vit.{name}": value for name, value in load_file(tmp_path / "model.safetensors").items()}
    save_file(stored, tmp_path / "model.safetensors")
    assert open_source(str(tmp_path)).left_behind == ()
    query = next(name for name in stored if name.endswith("query.weight"))
    _add(tmp_path, {query.replace("weight", "scale"): torch.ones(2)})
    with pytest.raises(SourceError, match=r"query\.scale"):
        open_source(str(tmp_path))


def test_bare_backbone_with_a_tied_head_is_the_whole_model(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    model.model.save_pretrained(tmp_path)
    assert all(not name.startswith("model.") for name in load_file(tmp_path / "model.safetensors"))
    source = open_source(str(tmp_path))
    source.materialise([""])
    assert source.left_behind == ()
    tokens = torch.arange(20)[None]
    assert torch.equal(source.skeleton()(tokens).logits, model(tokens).logits)


def test_bare_backbone_without_its_head_is_refused(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    AutoModel.from_pretrained(tmp_path).save_pretrained(tmp_path / "bare")
    with pytest.raises(SourceError, match=r"lacks 1 of the tensors .*lm_head\.weight"):
        open_source(str(tmp_path / "bare"))


@pytest.mark.parametrize(
    "name", ["blk.1.attn_q.bias", "blk.0.attn_q_norm.weight", "blk.0.new.weight", "output_norm.bias", "output.bias"]
)
def test_unread_gguf_tensor_of_a_model_module_is_refused(name: str, tmp_path: Path) -> None:
    save_tiny_gguf(tmp_path / "m.gguf", kind="F16", tensors={name: [1.0] * 4})
    with pytest.raises(SourceError, match="does not read") as caught:
        open_source(str(tmp_path / "m.gguf"))
    assert name in str(caught.value)


def test_frequencies_of_older_gguf_files_pass_silently(tmp_path: Path) -> None:
    save_tiny_gguf(tmp_path / "m.gguf", kind="F16", tensors={"blk.0.attn_rot_embd.weight": [1.0] * 8})
    assert open_source(str(tmp_path / "m.gguf")).left_behind == ()


def test_other_gguf_tensors_are_reported(tmp_path: Path) -> None:
    extra: dict[str, Any] = {"some.nonsense": [[1.0] * 32] * 2, "blk.2.attn_q.weight": [[1.0] * 32] * 3}
    save_tiny_gguf(tmp_path / "m.gguf", kind="F16", tensors=extra)
    source = open_source(str(tmp_path / "m.gguf"))
    assert {(entry.part, entry.nbytes) for entry in source.left_behind} == {("some", 256), ("model.layers.2", 384)}


@pytest.mark.parametrize("name", ["model", "model.layers", "lm_head", "model.layers.0"])
def test_tensor_with_the_name_of_a_module_is_not_read(name: str, tmp_path: Path) -> None:
    spec = _add(save_tiny("llama", tmp_path), {name: torch.ones(2)})
    if name in ("lm_head", "model.layers.0"):
        with pytest.raises(SourceError, match="does not read"):
            open_source(spec)
    else:
        assert [entry.part for entry in open_source(spec).left_behind] == [name]
