"""Position limits: a model runs exactly that many tokens. Without a hard limit, the trained length counts, or none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from shiftadd_cli.errors import RecipeError
from shiftadd_cli.source.positions import position_limit, window_length

_COMMON: dict[str, Any] = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
_GPT: dict[str, Any] = {**_COMMON, "n_embd": 32, "n_head": 2, "n_layer": 1, "n_positions": 16}
_BERT: dict[str, Any] = {**_COMMON, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
                         "num_attention_heads": 2, "max_position_embeddings": 16, "is_decoder": True}  # fmt: skip
_ROTARY: dict[str, Any] = {**_COMMON, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
                           "num_attention_heads": 2, "max_position_embeddings": 16}  # fmt: skip
TABLES: dict[str, dict[str, Any]] = {
    "opt": {**_COMMON, "hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "max_position_embeddings": 16, "word_embed_proj_dim": 32},
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "openai-gpt": _GPT,
    "ctrl": {**_GPT, "dff": 32},
    "gptj": {**_GPT, "rotary_dim": 8},
    "gpt_neo": {**_COMMON, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "max_position_embeddings": 16,
                "attention_types": [[["global"], 1]]},
    "biogpt": {**_BERT, "is_decoder": False},
    "mpt": {**_COMMON, "d_model": 32, "n_heads": 2, "n_layers": 1, "max_seq_len": 16},
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "data2vec-text": _BERT,
    "whisper": {**_COMMON, "d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32,
                "max_target_positions": 16},
}  # fmt: skip


def runs(model: PreTrainedModel, length: int) -> bool:
    try:
        with torch.no_grad():
            model(input_ids=torch.full((1, length), 5), use_cache=False)
    except (IndexError, RuntimeError, ValueError):
        return False
    return True


@pytest.mark.parametrize("kind", TABLES)
def test_table_of_positions_ends_at_the_limit(kind: str) -> None:
    config = AutoConfig.for_model(kind, **TABLES[kind])
    limit = position_limit(config)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert limit is not None
    assert runs(model, limit)
    assert not runs(model, limit + 1)


@pytest.mark.parametrize("kind", ["llama", "phi", "gpt_neox"])
def test_rotary_positions_have_the_configured_limit(kind: str) -> None:
    config = AutoConfig.for_model(kind, **_ROTARY)
    assert position_limit(config) == 16
    assert runs(AutoModelForCausalLM.from_config(config).eval(), 40)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"rope_type": "default"}, 16),
        ({"rope_type": "linear", "factor": 4.0}, 64),
        ({"rope_type": "dynamic", "factor": 2.0}, 32),
        ({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}, 128),
        # The configuration already includes the gain from scaling.
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8}, 16),
    ],
)
def test_scaled_rotary_positions_reach_further(scaling: dict[str, Any], expected: int) -> None:
    config = AutoConfig.for_model("llama", **_ROTARY, rope_parameters={"rope_theta": 10000.0, **scaling})
    assert position_limit(config) == expected


def test_positions_without_an_end_have_no_limit() -> None:
    bloom = AutoConfig.for_model("bloom", **_COMMON, hidden_size=32, n_head=2, n_layer=1)
    assert position_limit(bloom) is None
    alibi = AutoConfig.for_model("falcon", **_ROTARY, alibi=True)
    assert position_limit(alibi) is None
    assert position_limit(AutoConfig.for_model("falcon", **_ROTARY)) is not None
    assert position_limit(AutoConfig.for_model("mamba")) is None


def test_sliding_window_is_not_a_limit() -> None:
    config = AutoConfig.for_model("mistral", **_ROTARY, sliding_window=4)
    assert position_limit(config) == 16


def test_default_length_is_shortened_and_explicit_length_refused() -> None:
    limits = {"long": 64, "short": 16, "endless": None}
    assert window_length(None, 32, limits, "`seq_len`") == 16
    assert window_length(None, 8, limits, "`seq_len`") == 8
    assert window_length(16, 32, limits, "`seq_len`") == 16
    assert window_length(None, 32, {"endless": None}, "`seq_len`") == 32
    assert window_length(99, 32, {"endless": None}, "`seq_len`") == 99
    with pytest.raises(RecipeError, match=r"17 tokens is longer than the 16 positions of short; give `seq_len` 16"):
        window_length(17, 32, limits, "`seq_len`")
