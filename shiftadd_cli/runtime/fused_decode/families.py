"""The transformers decoders whose blocks the CPU kernels can compute as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

_LLAMA = {
    "before_attention": "input_layernorm",
    "before_mlp": "post_attention_layernorm",
    "query": "q_norm",
    "key": "k_norm",
}
_OLMO = {
    "after_attention": "post_attention_layernorm",
    "after_mlp": "post_feedforward_layernorm",
    "query": "q_norm",
    "key": "k_norm",
}
_GEMMA = {
    "before_attention": "input_layernorm",
    "after_attention": "post_attention_layernorm",
    "before_mlp": "pre_feedforward_layernorm",
    "after_mlp": "post_feedforward_layernorm",
    "query": "q_norm",
    "key": "k_norm",
}


class Family(NamedTuple):
    """Blocks that compute like Llama's: a norm, attention with rotary embeddings over whole heads, a norm, a gated MLP,
    and two residuals, with optional norms of heads and of the outputs added to the residuals.

    block: name of the class in `transformers.models`; model: name of the class that calls such blocks one after the
    other with the same arguments, if any; norms: attributes by role, those of heads may be missing; epsilon: attribute
    of a norm; unit: added to the weights of norms; joint: the norms of queries and keys span all heads.
    """

    block: str
    model: str | None
    norms: Mapping[str, str]
    epsilon: str = "variance_epsilon"
    unit: float = 0.0
    joint: bool = False


def _family(module: str, name: str, norms: Mapping[str, str] = _LLAMA, *, joint: bool = False) -> Family:
    path = f"{module}.modeling_{module}.{name}"
    return Family(f"{path}DecoderLayer", f"{path}Model", norms, joint=joint)


_FAMILIES = (
    _family("llama", "Llama"),
    _family("mistral", "Mistral"),
    _family("qwen2", "Qwen2"),
    _family("qwen3", "Qwen3"),
    _family("smollm3", "SmolLM3"),
    _family("granite", "Granite"),
    _family("olmo2", "Olmo2", _OLMO, joint=True),
    # Its blocks differ in their masks and positions.
    Family("gemma3.modeling_gemma3.Gemma3DecoderLayer", None, _GEMMA, "eps", unit=1.0),
)
BLOCKS = {family.block: family for family in _FAMILIES}
MODELS = frozenset(family.model for family in _FAMILIES if family.model is not None)


def name_of(kind: type[nn.Module]) -> str:
    """The name of a class as in `BLOCKS` and `MODELS`."""
    return f"{kind.__module__}.{kind.__name__}".removeprefix("transformers.models.")
