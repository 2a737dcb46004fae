"""Buffers that no file holds, against transformers loading the same folder."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from shiftadd_cli.errors import SourceError
from shiftadd_cli.source import open_source
from shiftadd_cli.source.unstored import compute_unstored

_COMMON = {"vocab_size": 64, "hidden_size": 32, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_SIZES = {**_COMMON, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
          "intermediate_size": 48, "max_position_embeddings": 64}  # fmt: skip
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def _llama(**rope: Any) -> tuple[str, dict[str, Any]]:
    return "llama", {**_SIZES, "rope_parameters": {"rope_theta": 10000.0, **rope}}


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": _llama(rope_type="default"),
    "llama-linear": _llama(rope_type="linear", factor=2.0),
    "llama-dynamic": _llama(rope_type="dynamic", factor=2.0),
    "llama-yarn": _llama(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
    "llama-llama3": _llama(**_LLAMA3, original_max_position_embeddings=16),
    "llama-longrope": _llama(
        rope_type="longrope", short_factor=[1.0, 1.5, 2.0, 3.0], long_factor=[1.0, 2.0, 4.0, 8.0],
        original_max_position_embeddings=16, factor=4.0,
    ),
    "falcon_h1": ("falcon_h1", {**_SIZES, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1,
                                "mamba_d_state": 8, "mamba_chunk_size": 16, "head_dim": 8,
                                "ssm_multipliers": [0.5, 0.7, 0.9, 1.1, 1.3]}),
    "gemma3": ("gemma3_text", {**_SIZES, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    "gemma2": ("gemma2", {**_SIZES, "head_dim": 8}),
    "recurrent_gemma": ("recurrent_gemma", {**_SIZES, "lru_width": 32}),
    "deepseek_v3": ("deepseek_v3", {**_SIZES, "num_key_value_heads": 4, "num_experts_per_tok": 2, "n_group": 1,
                                    "moe_intermediate_size": 20, "n_routed_experts": 4, "topk_group": 1,
                                    "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8,
                                    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
                                    "n_shared_experts": 1}),
    "mamba": ("mamba", {**_COMMON, "num_hidden_layers": 2, "state_size": 4}),
    "mpt": ("mpt", {**_COMMON, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
    "bloom": ("bloom", {**_COMMON, "n_head": 4, "n_layer": 2}),
    "gpt2": ("gpt2", {**_COMMON, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}),
    "gpt_neo": ("gpt_neo", {**_COMMON, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64,
                            "attention_types": [[["global", "local"], 1]]}),
    "gptj": ("gptj", {**_COMMON, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "rotary_dim": 4}),
    "xglm": ("xglm", {**_COMMON, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4,
                      "max_position_embeddings": 64}),
    "ctrl": ("ctrl", {**_COMMON, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "dff": 48}),
}  # fmt: skip


@functools.cache
def _unstored_count(name: str) -> int:
    kind, settings = MODELS[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    return sum(1 for _ in model.named_non_persistent_buffers())


def _buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_buffers(remove_duplicate=False))


def test_models_compute_buffers_of_many_kinds() -> None:
    assert sum(_unstored_count(name) > 0 for name in MODELS) >= 14


@pytest.mark.parametrize("name", MODELS)
def test_buffers_match_those_of_transformers(name: str, tmp_path: Path) -> None:
    kind, settings = MODELS[name]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).save_pretrained(tmp_path)
    expected = _buffers(AutoModelForCausalLM.from_pretrained(tmp_path))
    source = open_source(str(tmp_path))
    source.materialise([""])
    buffers = _buffers(source.skeleton())
    assert buffers.keys() == expected.keys()
    for buffer, value in expected.items():
        assert buffers[buffer].dtype == value.dtype, buffer
        assert torch.equal(buffers[buffer], value), buffer


def test_buffer_computed_by_an_outer_module_is_loaded_with_its_block(tmp_path: Path) -> None:
    kind, settings = MODELS["falcon_h1"]
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).save_pretrained(tmp_path)
    source = open_source(str(tmp_path))
    source.materialise(["model.layers.1"])
    expected = AutoModelForCausalLM.from_pretrained(tmp_path).model.layers[1].mamba.mup_vector
    assert len(expected.unique()) == 5
    assert torch.equal(source.skeleton().model.layers[1].mamba.mup_vector, expected)


class _Owner(nn.Module):
    """The part of a transformers model that computing buffers needs."""

    scale: torch.Tensor

    def __init__(self, *, computed: int, random: bool = False) -> None:
        super().__init__()
        self.register_buffer("scale", torch.empty(4, device="meta"), persistent=False)
        self.weight = nn.Parameter(torch.full((2,), 3.0), requires_grad=False)
        self._computed, self._random = computed, random

    def _init_weights(self, module: nn.Module) -> None:
        self.scale[: self._computed] = torch.rand(self._computed) if self._random else 2.0
        self.weight.fill_(7.0)


def test_computed_buffers_replace_nothing_that_was_read() -> None:
    model = _Owner(computed=4)
    compute_unstored(model, ["scale"], "m")
    assert model.scale.tolist() == [2.0] * 4
    assert model.weight.tolist() == [3.0] * 2


@pytest.mark.parametrize(("computed", "random"), [(0, False), (3, False), (4, True)])
def test_partly_or_randomly_computed_buffer_is_refused_by_name(computed: int, random: bool) -> None:
    model = _Owner(computed=computed, random=random)
    with pytest.raises(SourceError, match=r"m lacks 1 tensors that _Owner needs .*\(first: scale\)"):
        compute_unstored(model, ["scale"], "m")
    assert model.scale.is_meta
    assert model.weight.tolist() == [3.0] * 2


def test_model_that_does_not_compute_a_buffer_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Remote code for transformers 4 behaves like this, because it computed buffers only in the constructor."""
    from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1PreTrainedModel

    kind, settings = MODELS["falcon_h1"]
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).save_pretrained(tmp_path)
    monkeypatch.setattr(FalconH1PreTrainedModel, "_init_weights", lambda self, module: None)
    with pytest.raises(SourceError, match=r"does not compute by itself \(first: model\.layers\.0\.mamba\.mup_vector\)"):
        open_source(str(tmp_path))
