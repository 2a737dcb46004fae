"""The written config.json: the source's own fields stay, and all versions of transformers read the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny
from tiny_vision import save_tiny_vision
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
)

from shiftadd_cli.source import open_source
from shiftadd_cli.source.config_file import merged_config, own_fields, set_dtype

LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Written by transformers to describe the folder or the program, not the model.
NOT_OF_THE_MODEL = ("transformers_version", "_name_or_path", "architectures", "auto_map")
# The defaults of gemma4_assistant fail its own check.
FAMILIES = sorted(
    ({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES} & set(CONFIG_MAPPING.keys()))
    - {"gemma4_assistant"}
)


def _in_old_form(folder: Path, *drop: str, **fields: Any) -> dict[str, Any]:
    """Write config.json as transformers 4 did, and as most of the hub still has it."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name in ("rope_parameters", "dtype", *drop):
        config.pop(name, None)
    config |= {"torch_dtype": "float32", "transformers_version": "4.45.0"} | fields
    path.write_text(json.dumps(config))
    return config


def _as_read(folder: Path) -> dict[str, Any]:
    fields = AutoConfig.from_pretrained(folder).to_dict()
    return {name: value for name, value in fields.items() if name not in NOT_OF_THE_MODEL}


def _written(source: Path, out: Path, **options: Any) -> dict[str, Any]:
    fields = open_source(str(source), **options).config_fields()
    out.mkdir()
    (out / "config.json").write_text(json.dumps(fields))
    return fields


def test_scaled_positions_keep_their_old_names(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    old = _in_old_form(folder, rope_theta=500000.0, rope_scaling=LLAMA_3)
    fields = _written(folder, tmp_path / "out")
    assert {name: fields.get(name) for name in old} == old
    assert fields["rope_parameters"] == LLAMA_3 | {"rope_theta": 500000.0}
    assert _as_read(tmp_path / "out") == _as_read(folder)


def test_number_of_experts_keeps_its_old_name(tmp_path: Path) -> None:
    folder = save_tiny("qwen3_moe", tmp_path / "model")
    old = _in_old_form(folder, "num_local_experts", num_experts=6, rope_theta=1000000.0)
    fields = _written(folder, tmp_path / "out")
    assert {name: fields.get(name) for name in old} == old
    assert fields["num_local_experts"] == 6
    assert _as_read(tmp_path / "out") == _as_read(folder)


def test_fields_unknown_to_transformers_stay(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    _in_old_form(folder, rope_theta=1e4, some_tool={"version": [1, 2]}, unsloth_version="2024.9")
    fields = _written(folder, tmp_path / "out")
    assert (fields["some_tool"], fields["unsloth_version"]) == ({"version": [1, 2]}, "2024.9")


def test_another_dtype_is_written_under_both_names(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    _in_old_form(folder, rope_theta=1e4)
    fields = _written(folder, tmp_path / "out", dtype="bfloat16")
    assert (fields["dtype"], fields["torch_dtype"]) == ("bfloat16", "bfloat16")
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_head_stored_beside_the_embedding_is_declared_untied(tmp_path: Path) -> None:
    folder = save_tiny("qwen2", tmp_path / "model")
    _in_old_form(folder, rope_theta=1e4)
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding + 1}, folder / "model.safetensors", {"format": "pt"})
    fields = _written(folder, tmp_path / "out")
    assert fields["tie_word_embeddings"] is False


def test_code_that_is_not_run_is_not_named(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    _in_old_form(folder, rope_theta=1e4, auto_map={"AutoConfig": "configuration_mine.MyConfig"})
    assert "auto_map" not in _written(folder, tmp_path / "out")


def test_image_labels_are_written_once(tmp_path: Path) -> None:
    folder = save_tiny_vision("vit", tmp_path / "model")
    old = _in_old_form(folder)
    fields = _written(folder, tmp_path / "out")
    assert fields["id2label"] == old["id2label"]
    assert _as_read(tmp_path / "out") == _as_read(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_configuration_of_transformers_reads_back(family: str, tmp_path: Path) -> None:
    kind, path = CONFIG_MAPPING[family], tmp_path / "config.json"

    def read(fields: dict[str, Any]) -> Any:
        path.write_text(json.dumps(fields))
        return kind.from_json_file(path)

    raw = json.loads(kind().to_json_string(use_diff=False)) | {"torch_dtype": "float32", "of_another_tool": 1}
    raw.pop("dtype", None)
    config = read(raw)
    fields = merged_config(raw, config)
    assert {name: fields.get(name) for name in raw} == raw
    again, expected = read(fields).to_dict(), config.to_dict()
    for name in NOT_OF_THE_MODEL:
        again.pop(name, None), expected.pop(name, None)
    assert again == expected


def test_dtype_of_parts_follows() -> None:
    config = {
        "torch_dtype": "bfloat16",
        "text_config": {"torch_dtype": "bfloat16", "audio_config": {"dtype": "float32"}},
        "vision_config": {"dtype": None},
        "quantization_config": {"dtype": "kept"},
    }
    set_dtype(config, "float16")
    assert config == {
        "dtype": "float16",
        "torch_dtype": "float16",
        "text_config": {"torch_dtype": "float16", "audio_config": {"dtype": "float16"}},
        "vision_config": {"dtype": None},
        "quantization_config": {"dtype": "kept"},
    }


def _old_gemma(folder: Path) -> dict[str, Any]:
    """Write the configuration of Gemma 3 as on the hub, with a separate table for the text part."""
    raw: dict[str, Any] = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "image_token_index": 302,
        "torch_dtype": "bfloat16",
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
            "sliding_window_pattern": 2,
        },
        "vision_config": {"hidden_size": 32, "model_type": "siglip_vision_model"},
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    return raw


def _includes(fields: dict[str, Any], raw: dict[str, Any]) -> bool:
    return all(
        _includes(fields[name], value) if isinstance(value, dict) else fields[name] == value
        for name, value in raw.items()
    )


def test_fields_of_parts_keep_their_old_names(tmp_path: Path) -> None:
    raw = _old_gemma(tmp_path / "model")
    config = AutoConfig.from_pretrained(tmp_path / "model")
    fields = merged_config(raw, config)
    assert _includes(fields, raw)
    assert fields["text_config"]["rope_parameters"]["full_attention"]["factor"] == 8.0
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text(json.dumps(fields))
    assert _as_read(tmp_path / "out") == _as_read(tmp_path / "model")


def test_extracted_part_keeps_its_own_fields(tmp_path: Path) -> None:
    raw = _old_gemma(tmp_path / "model")
    config = AutoConfig.from_pretrained(tmp_path / "model")
    own = own_fields(raw, config, config.text_config)
    assert own == raw["text_config"]
    assert own_fields(raw, config, config) is raw
    fields = merged_config(own, config.text_config)
    assert _includes(fields, own)
    assert "vision_config" not in fields
