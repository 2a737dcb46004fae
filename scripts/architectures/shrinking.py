"""The smallest configuration of an architecture that still has every kind of its layers.

The rules recognise sizes by the names of configuration fields in transformers; they know no architecture by name.
`exceptions.py` has the settings that these rules cannot know.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

VOCAB_SIZE = 320
# Vocabulary entries that represent no byte.
SPECIAL = 64
HIDDEN = 32
LAYERS = 3
LABELS = 5
IMAGE_SIZE = 32

# Names of the fields that hold the number of layers.
_LAYERS = re.compile(r"(num_(hidden_|decoder_|encoder_)?layers|n_layers?|(en|de)coder_layers|num_layers_per_stack)")

# The first pattern that matches the full name of a field gives its upper limit; None leaves the default as it is.
_SIZES: tuple[tuple[str, int | None], ...] = (
    (r"chunk_size_.*|pretraining_tp|type_vocab_size|task_type_vocab_size|num_channels|num_labels", None),
    (r".*vocab_size(_per_layer_input|_base)?", VOCAB_SIZE),
    (r"hidden_size_per_layer_input|o_lora_rank|.*_lora_rank|.*_rank|ple_embed_dim", 8),
    (r".*(moe|expert|experts)_(intermediate|ffn_hidden)_size|.*shared.*intermediate_size", 24),
    (r".*intermediate_size(_mlp)?|.*ffn_dim|dff|dim_ff|ffn_hidden_size|d_inner|feed_forward_size", 48),
    (r"qk_head_dim", 16),
    (r".*head_dim|kv_channels|attention_head_size|d_head|dim_head|mamba_d_head|rotary_dim", 8),
    (r"(mamba_)?(d_)?(ssm_)?state(_size)?", 8),
    (r"mamba_d_ssm", 2 * HIDDEN),
    (r"(n_)?mamba_(num_|n_)?heads", 8),
    (r"linear_num_value_heads", 4),
    (r"linear_num_(key_)?heads|index_n_heads", 2),
    (r"(mamba_)?n_?groups|n_group", 2),
    (r"topk_group", 1),
    (r"(num|n|moe_num)_(shared|routed)?_?(local_)?experts|num_local_experts|moe_num_experts|zero_expert_num", 4),
    (r"num_experts_per_tok|moe_topk|moe_k|top_k_experts", 2),
    (r"(mamba_)?chunk_size|block_size|block_multiple_of", 8),
    (r"n_embd|d_model|emb_dim|embed(ding)?_dim|(input_|output_)?embedding_size|lru_width", HIDDEN),
    (r"(.*_)?hidden_size|word_embed_proj_dim|projection_dim|pooler_output_size|out_hidden_size|.*_embed_dim", HIDDEN),
    (r"max_(source_|target_)?positions?(_embeddings)?|n_positions|n_ctx|max_seq_len|context_length", 128),
    (r"original_max_position_embeddings|num_position_embeddings", 64),
    # Shorter than the test windows, so that some tokens lie outside the sliding window.
    (r".*sliding_window(_size)?|attention_(chunk|window)_size|local_attention(_window_len)?|keep_window_size", 8),
    (r"index_topk|centroid_intermediate_top_k", 4),
    (r"image_size", IMAGE_SIZE),
    (r"(num_)?depths?|num_(mtp_|nextn_predict_)layers", 2),
)
_MARKS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_COMPILED = tuple((re.compile(pattern), size) for pattern, size in _SIZES)
_HEADS = re.compile(r"(.*_)?heads?")
_KEY_VALUE_HEADS = re.compile(r".*(key_value|kv)_heads")
_TOKEN = re.compile(r".*(token_id|_token_index|_id|(mask|pad|bos|eos|unk)_index)")


def small_settings(
    config_class: Any, exceptions: Mapping[str, Mapping[str, Any]], changes: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Keyword arguments that make the smallest `config_class`.

    exceptions: by model type, arguments that override the rules; a name that ends with a dot holds those of the
    configuration nested under it. changes: override both.
    """
    exact = {**exceptions.get(config_class.model_type, {}), **(changes or {})}
    try:
        default = config_class()
    except Exception:  # a few classes reject their own defaults, with any exception
        default = config_class(**{name: value for name, value in exact.items() if not name.endswith(".")})
    fields = [field for field in dataclasses.fields(config_class) if field.init and not field.name.startswith("_")]
    values = {field.name: _read(default, field) for field in fields}
    per_layer = _per_layer_lists(values)
    settings: dict[str, Any] = {}
    count = LAYERS
    if lengths := [len(value) for name, value in exact.items() if name in per_layer]:
        count = lengths[0]
    elif per_layer:
        picked = _every_kind(list(zip(*per_layer.values(), strict=True)))
        count = len(picked)
        for name, value in per_layer.items():
            settings[name] = [_small(name, value[index], values) for index in picked]
    tokens = iter(range(len(_MARKS), SPECIAL))
    parts = getattr(config_class, "sub_configs", None) or {}
    for name, value in values.items():
        if name in settings or name in exact:
            continue
        if name in parts:
            if dataclasses.is_dataclass(value) and not isinstance(value, type):
                part = type(value)
                settings[name] = part(**small_settings(part, exceptions, exact.get(f"{name}.")))
        elif name in _MARKS:
            settings[name] = _MARKS[name]
        elif isinstance(value, bool) or not isinstance(value, int):
            continue
        elif _LAYERS.fullmatch(name):
            settings[name] = count
        elif _TOKEN.fullmatch(name):
            if value >= SPECIAL:
                settings[name] = next(tokens)
        else:
            settings[name] = _small(name, value, values)
    if "is_decoder" in values:
        settings["is_decoder"] = True
    return settings | {name: value for name, value in exact.items() if not name.endswith(".")}


def _read(config: Any, field: Any) -> Any:
    try:
        return getattr(config, field.name, None)
    except RuntimeError:
        # The value differs between layers; the default of the class applies to most of them.
        return None if field.default is dataclasses.MISSING else field.default


def _small(name: str, value: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if _KEY_VALUE_HEADS.fullmatch(name):
        heads = next(
            (number for key, number in values.items() if _HEADS.fullmatch(key) and isinstance(number, int)), value
        )
        return 1 if value == 1 else 4 if value == heads else 2
    for pattern, size in _COMPILED:
        if pattern.fullmatch(name):
            return value if size is None else min(value, size)
    if _HEADS.fullmatch(name):
        return min(value, 4)
    return value


def _per_layer_lists(values: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The fields that hold one value for each layer."""
    counts = {value for name, value in values.items() if _LAYERS.fullmatch(name) and isinstance(value, int)}
    lists = {
        name: list(value)
        for name, value in values.items()
        if isinstance(value, (list, tuple)) and len(value) > 1 and len(value) in counts and not _are_numbers(value)
    }
    longest = max((len(layers) for layers in lists.values()), default=0)
    return {name: layers for name, layers in lists.items() if len(layers) == longest}


def _are_numbers(values: Sequence[Any]) -> bool:
    """Whether these are indices of layers, not a property of each."""
    return all(isinstance(value, int) for value in values) and all(a < b for a, b in pairwise(values))


def _every_kind(kinds: Sequence[Any]) -> list[int]:
    """Indices of a few layers, in order, that include every kind and at least one kind twice."""
    first: list[int] = []
    seen: list[Any] = []
    again: list[int] = []
    for index, kind in enumerate(kinds):
        if kind not in seen:
            seen.append(kind)
            first.append(index)
        else:
            again.append(index)
    missing = max(1, LAYERS - len(first))
    return sorted(first + again[:missing])
