"""The empty model against the one that transformers would load into."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from shiftadd_cli.errors import SourceError
from shiftadd_cli.source.skeleton import build_skeleton, tied_groups


@pytest.mark.parametrize("family", FAMILIES)
def test_skeleton_has_the_tensors_of_the_real_model_on_meta(family: str) -> None:
    real = tiny_model(family)
    model = build_skeleton(type(real), real.config, torch.bfloat16)
    assert not model.training
    assert {n: v.shape for n, v in model.state_dict().items()} == {n: v.shape for n, v in real.state_dict().items()}
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert tied_groups(model) == tied_groups(real)


def test_configuration_is_not_changed() -> None:
    config = tiny_config("llama")
    before = config.to_dict()
    model = build_skeleton(type(tiny_model("llama")), config, torch.float16)
    assert config.to_dict() == before
    assert model.config.dtype == torch.float16


def test_parameters_kept_in_float32_start_in_float32() -> None:
    config = AutoConfig.for_model(
        "deepseek_v3", vocab_size=64, hidden_size=32, intermediate_size=40, moe_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, n_group=1, topk_group=1,
        num_experts_per_tok=2, first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    tensors = build_skeleton(model_class, config, torch.bfloat16).state_dict()
    assert tensors["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert tensors["model.layers.1.self_attn.o_proj.weight"].dtype == torch.bfloat16


def test_parameters_created_off_meta_are_moved() -> None:
    """DiffLlama makes its lambdas on the CPU even under a meta device. Left there, they would never be loaded."""
    config = AutoConfig.for_model(
        "diffllama", vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    model = build_skeleton(AutoModelForCausalLM._model_mapping[type(config)], config, torch.float32)
    assert model.get_parameter("model.layers.0.self_attn.lambda_q1").is_meta


def test_configuration_that_the_class_rejects_is_refused() -> None:
    real = tiny_model("gpt2")
    real.config.n_head = 5
    with pytest.raises(SourceError, match=r"GPT2LMHeadModel cannot be built.*config\.json"):
        build_skeleton(type(real), real.config, torch.float32)
