"""Small random checkpoints of real architectures, with a real tokenizer, built in well under a second each.

Everything here is made from seeds and the standard library, so tests need no download. Widths are chosen to be
awkward: several input widths are not multiples of 8, query and key heads differ in number, some models tie their
embeddings and some do not.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCAB_SIZE = 320
_SPECIAL = ("<|endoftext|>", "<|user|>", "<|assistant|>")
_CHAT_TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|endoftext|>{% endfor %}"

_COMMON = {"vocab_size": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_ROTARY = {**_COMMON, "max_position_embeddings": 512, "num_attention_heads": 4, "num_hidden_layers": 2}
_SETTINGS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {**_ROTARY, "hidden_size": 48, "intermediate_size": 100, "num_key_value_heads": 2}),
    "mistral": ("mistral", {**_ROTARY, "hidden_size": 36, "head_dim": 8, "intermediate_size": 76,
                            "num_key_value_heads": 1, "sliding_window": 64}),
    "qwen2": ("qwen2", {**_ROTARY, "hidden_size": 32, "intermediate_size": 84, "num_key_value_heads": 2,
                        "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**_ROTARY, "hidden_size": 32, "head_dim": 16, "intermediate_size": 72, "num_key_value_heads": 2,
                        "tie_word_embeddings": True, "num_hidden_layers": 3}),
    "gemma3": ("gemma3_text", {**_ROTARY, "hidden_size": 32, "head_dim": 16, "intermediate_size": 60,
                               "num_key_value_heads": 1, "num_hidden_layers": 3, "sliding_window": 32,
                               "query_pre_attn_scalar": 16,
                               "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "phi": ("phi", {**_ROTARY, "hidden_size": 48, "intermediate_size": 90, "partial_rotary_factor": 0.5}),
    "opt": ("opt", {**_COMMON, "hidden_size": 40, "ffn_dim": 92, "num_attention_heads": 4, "num_hidden_layers": 2,
                    "max_position_embeddings": 512, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "gpt2": ("gpt2", {**_COMMON, "n_embd": 36, "n_head": 4, "n_layer": 2, "n_inner": 100, "n_positions": 512}),
    "bloom": ("bloom", {**_COMMON, "hidden_size": 36, "n_head": 4, "n_layer": 2, "hidden_dropout": 0.0}),
}  # fmt: skip
FAMILIES = tuple(_SETTINGS)

# More decoders whose whole blocks the kernels compute.
_DECODERS: dict[str, tuple[str, dict[str, object]]] = {
    "smollm3": ("smollm3", {**_ROTARY, "hidden_size": 48, "intermediate_size": 88, "num_key_value_heads": 2,
                            "num_hidden_layers": 3, "no_rope_layers": [1, 0, 1], "tie_word_embeddings": True}),
    "granite": ("granite", {**_ROTARY, "hidden_size": 48, "intermediate_size": 72, "num_key_value_heads": 2,
                            "residual_multiplier": 0.4, "attention_multiplier": 0.2, "embedding_multiplier": 3.0,
                            "logits_scaling": 2.0}),
    "olmo2": ("olmo2", {**_ROTARY, "hidden_size": 48, "intermediate_size": 84, "num_key_value_heads": 2}),
}  # fmt: skip

_SPARSE = {**_ROTARY, "hidden_size": 32, "num_key_value_heads": 2, "num_experts_per_tok": 2}
_MIXTURES: dict[str, tuple[str, dict[str, object]]] = {
    "mixtral": ("mixtral", {**_SPARSE, "intermediate_size": 44, "num_local_experts": 4}),
    "qwen2_moe": ("qwen2_moe", {**_SPARSE, "intermediate_size": 40, "moe_intermediate_size": 28, "num_experts": 4,
                                "shared_expert_intermediate_size": 36}),
    "qwen3_moe": ("qwen3_moe", {**_SPARSE, "head_dim": 16, "intermediate_size": 40, "moe_intermediate_size": 20,
                                "num_experts": 6, "norm_topk_prob": True, "tie_word_embeddings": True}),
    "olmoe": ("olmoe", {**_SPARSE, "intermediate_size": 28, "num_experts": 5}),
    "gpt_oss": ("gpt_oss", {**_SPARSE, "head_dim": 16, "intermediate_size": 36, "num_local_experts": 4,
                            "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}),
    "granitemoe": ("granitemoe", {**_SPARSE, "intermediate_size": 28, "num_local_experts": 4}),
    "deepseek_v3": ("deepseek_v3", {**_SPARSE, "num_key_value_heads": 4, "intermediate_size": 40,
                                    "moe_intermediate_size": 20, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
                                    "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8,
                                    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}),
}  # fmt: skip
MIXTURES = tuple(_MIXTURES)

# Decoders whose blocks take more than hidden states, masks and positions, differ in kind, or share weights.
_SLIDING, _FULL = "sliding_attention", "full_attention"
_STREAMS = {**_ROTARY, "hidden_size": 32, "head_dim": 8, "intermediate_size": 48, "sliding_window": 16,
            "vocab_size_per_layer_input": VOCAB_SIZE, "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 2}  # fmt: skip
_LINEAR, _HYBRID = "linear_attention", "hybrid"
_UNUSUAL: dict[str, tuple[str, dict[str, object]]] = {
    "gemma4": ("gemma4_text", {**_STREAMS, "num_hidden_layers": 6, "num_key_value_heads": 1, "global_head_dim": 16,
                               "layer_types": [_SLIDING, _FULL] * 3, "tie_word_embeddings": True}),
    "gemma3n": ("gemma3n_text", {**_STREAMS, "num_hidden_layers": 5, "num_key_value_heads": 2,
                                 "layer_types": [_SLIDING, _FULL, _SLIDING, _FULL, _SLIDING], "altup_num_inputs": 4,
                                 "laurel_rank": 4, "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0, 0.0]}),
    "zamba2": ("zamba2", {**_COMMON, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6,
                          "layers_block_type": [_LINEAR, _HYBRID] * 3, "n_mamba_heads": 8, "mamba_expand": 2,
                          "mamba_d_state": 8, "mamba_ngroups": 1, "chunk_size": 16, "num_attention_heads": 4,
                          "num_mem_blocks": 1, "use_shared_attention_adapter": True, "adapter_rank": 4,
                          "use_mem_rope": True}),
    "mamba": ("mamba", {**_COMMON, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "expand": 2,
                        "time_step_rank": 4}),
    "jamba": ("jamba", {**_COMMON, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4,
                        "num_attention_heads": 4, "num_key_value_heads": 2, "attn_layer_period": 2,
                        "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 4,
                        "num_experts_per_tok": 2, "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False}),
    "falcon": ("falcon", {**_COMMON, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "llama4": ("llama4_text", {**_ROTARY, "hidden_size": 32, "head_dim": 8, "intermediate_size": 40,
                               "intermediate_size_mlp": 56, "num_key_value_heads": 2, "num_local_experts": 4,
                               "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "attention_chunk_size": 16}),
    "xlm_roberta": ("xlm-roberta", {**_COMMON, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                                    "num_attention_heads": 4, "is_decoder": True, "max_position_embeddings": 514}),
}  # fmt: skip
UNUSUAL = tuple(_UNUSUAL)

# Experts stacked in one matrix, which no code here splits.
_PARTIAL: dict[str, tuple[str, dict[str, object]]] = {
    "dbrx": ("dbrx", {**_COMMON, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64,
                      "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
                      "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}}),
}  # fmt: skip


def tiny_config(family: str) -> PreTrainedConfig:
    """Configuration of a random small decoder; `family` is one of `FAMILIES`, `MIXTURES` or `UNUSUAL`, or in
    `_DECODERS` or `_PARTIAL`."""
    model_type, settings = (_SETTINGS | _DECODERS | _MIXTURES | _UNUSUAL | _PARTIAL)[family]
    return AutoConfig.for_model(model_type, **settings)


def tiny_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model in evaluation mode; no weight, bias or norm keeps its constant initial value."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.7 / parameter.shape[-1] ** 0.5)
                else:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.config.architectures = [type(model).__name__]
    return model.to(dtype).eval()


@lru_cache(maxsize=1)
def _tokenizer_json() -> str:
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([topics[name][:4000] for name in sorted(topics)], trainer)
    return tokenizer.to_str()


def tiny_tokenizer(*, before: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCAB_SIZE` entries with a chat template; it covers every string.

    before: special tokens that it puts before every text.
    """
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    backend = Tokenizer.from_str(_tokenizer_json())
    if before:
        ids = [(name, backend.token_to_id(name)) for name in dict.fromkeys(before)]
        backend.post_processor = TemplateProcessing(single=[*before, "$A"], special_tokens=ids)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=_SPECIAL[0],
        eos_token=_SPECIAL[0],
        pad_token=_SPECIAL[0],
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def save_tiny(
    family: str,
    folder: Path,
    *,
    sharded: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    before: tuple[str, ...] = (),
) -> Path:
    """Write a random checkpoint with its tokenizer to `folder` and return it.

    The same seed gives the same weights; `sharded` spreads them over several files with an index. before: special
    tokens that the tokenizer puts before every text.
    """
    tiny_model(family, seed=seed, dtype=dtype).save_pretrained(folder, max_shard_size="30KB" if sharded else "5GB")
    tiny_tokenizer(before=before).save_pretrained(folder)
    return folder


def save_tiny_gguf(
    path: Path,
    *,
    kind: str = "Q8_0",
    seed: int = 0,
    tensors: dict[str, Any] | None = None,
    metadata: dict[str, float | str] | None = None,
    tensors_a_part: int = 0,
    adds_bos: bool = False,
    **settings: Any,
) -> PreTrainedModel:
    """Write a random Llama with the tiny tokenizer as a GGUF file, as llama.cpp's converter lays it out.

    `kind` is the ggml type of the matrices (F16, Q8_0, Q4_1, ...); norms are F32. `tensors` (float32 arrays) and
    `metadata` (text and numbers) are written too; `settings` belong to the model's configuration. With `tensors_a_part`
    the model is written in parts next to `path`, under llama.cpp's names for them. adds_bos: the file says that
    a text begins with the bos token. Returns the model before rounding.
    """
    import gguf
    import numpy as np

    config = AutoConfig.for_model(
        "llama", **{**_ROTARY, "hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2, **settings}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=tensors_a_part)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(VOCAB_SIZE)
    _write_gguf_tokenizer(writer)
    if adds_bos:
        writer.add_add_bos_token(True)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        weight = value.numpy()
        for projection, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if projection in name:  # rotary pairs are adjacent in GGUF, halves here
                weight = weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)
        stored = gguf.GGMLQuantizationType[kind if weight.ndim == 2 else "F32"]
        packed = gguf.quantize(np.ascontiguousarray(weight), stored)
        gguf_name = names.get_name(name, (".weight",))
        assert gguf_name is not None, name
        writer.add_tensor(gguf_name, packed, raw_dtype=stored)
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, np.asarray(array, dtype=np.float32), raw_dtype=gguf.GGMLQuantizationType.F32)
    for key, value in (metadata or {}).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_float32(key, value)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return model


def _write_gguf_tokenizer(writer: Any) -> None:
    import gguf

    parts = json.loads(_tokenizer_json())["model"]
    tokens = sorted(parts["vocab"], key=parts["vocab"].get)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([control if token in _SPECIAL else normal for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in parts["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template(_CHAT_TEMPLATE)
