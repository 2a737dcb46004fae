"""Makes attention layers of transformers' models linear, in place.

An attention layer of a supported model hands its rotated queries and keys to a function that its configuration names.
A linear one is the same module with another class, whose configuration names our function.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from shiftadd_cli.artifact.linear_attention import Heads
from shiftadd_cli.errors import LinearAttentionError
from shiftadd_cli.runtime.linear_attention.attention import Reach
from shiftadd_cli.runtime.linear_attention.cache_layer import LinearLayer
from shiftadd_cli.runtime.linear_attention.feature_maps import FeatureMap
from shiftadd_cli.runtime.made_class import Reduced, reduce_made

NAME, _RECORDING = "shiftadd_linear", "shiftadd_recording"
# Arguments of attention functions that change no result where they have these values.
_WITHOUT_EFFECT = {
    **dict.fromkeys(("softcap", "s_aux", "sliding_window", "position_bias", "cu_seq_lens_q", "cache")),
    "dropout": 0.0,
}


class LinearAttention(nn.Module):
    """An attention layer that `linearize` has converted."""

    dense_class: ClassVar[type[nn.Module]]
    feature_map: FeatureMap
    reach: Reach
    layer_idx: int
    _state: LinearLayer | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # The keyword is that of every decoder layer that calls the attention interface.
        cache = kwargs.get("past_key_values")
        self.__dict__["_state"] = None if cache is None else _layer_of(cache, self)
        try:
            return super().forward(*args, **kwargs)
        finally:
            del self.__dict__["_state"]

    def __reduce_ex__(self, _: Any) -> Reduced:
        return reduce_made(_linear_class, self)


def linearize(module: Any, feature_map: FeatureMap, reach: Reach) -> None:
    """Make one attention layer linear, in place.

    module: calls transformers' attention interface and has `layer_idx`; feature_map: becomes a submodule.

    Raises LinearAttentionError if the layer does not keep all tokens by itself.
    """
    check_cache(module)
    _attention_functions().register(NAME, _attention_function)
    module.__class__ = _linear_class(type(module))
    module.feature_map = feature_map
    module.reach = reach
    module.config = copy.copy(module.config)
    module.config._attn_implementation = NAME


def _attention_functions() -> Any:
    """The attention functions of transformers, which is still being imported when this module is."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS


def check_cache(module: Any) -> None:
    """Raises LinearAttentionError unless the layer's part of the cache is plain, and its own."""
    layers = DynamicCache(config=module.config).layers
    kind = type(layers[module.layer_idx])
    if kind is not DynamicLayer:
        raise LinearAttentionError(
            f"Attention layer {module.layer_idx} does not keep all tokens (its cache is a {kind.__name__}); leave it "
            "out of `layers`."
        )
    if getattr(module.config, "num_kv_shared_layers", 0):
        raise LinearAttentionError(
            f"{type(module).__name__} shares keys and values between layers, which linear attention does not keep."
        )


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _linear_class(dense: type[nn.Module]) -> type[nn.Module]:
    if dense not in _CLASSES:
        members = {"dense_class": dense, "__module__": __name__}
        _CLASSES[dense] = type(f"Linear{dense.__name__}", (LinearAttention, dense), members)
    return _CLASSES[dense]


def _layer_of(cache: Any, module: LinearAttention) -> LinearLayer:
    """The layer of a cache for this module, which takes the place of an empty plain one."""
    if not isinstance(cache, DynamicCache) or cache.offloading:
        raise LinearAttentionError(
            f"Linear attention needs a plain `DynamicCache`, not a {type(cache).__name__}; leave out the setting of "
            "the cache, or pass `past_key_values=DynamicCache(config=model.config)`."
        )
    index = module.layer_idx
    while len(cache.layers) <= index:
        cache.layers.append(DynamicLayer())
    layer: Any = cache.layers[index]
    if isinstance(layer, LinearLayer):
        return layer
    if not isinstance(layer, DynamicLayer) or layer.is_initialized:
        raise LinearAttentionError(
            f"The cache of layer {index} was filled by another model, or by this one before its attention became "
            "linear; begin with an empty cache."
        )
    cache.layers[index] = made = LinearLayer(module.feature_map, module.reach)
    return made


def _attention_function(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: outputs `[rows, tokens, heads, size]`."""
    for name, neutral in _WITHOUT_EFFECT.items():
        if kwargs.get(name, neutral) != neutral:
            raise LinearAttentionError(
                f"{type(module).dense_class.__name__} uses `{name}` in its attention, which linear attention does not "
                "know; leave the layer out of `layers`."
            )
    layer = module._state
    if layer is None:
        layer = LinearLayer(module.feature_map, module.reach)
        layer.update(key, value)
    output = layer.attend(query, attention_mask, query.shape[-1] ** -0.5 if scaling is None else scaling)
    return output.to(query.dtype).transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class Inputs:
    """What one call of an attention layer attends with.

    Attributes:
        query: rotated, `[rows, heads, tokens, size]`; key: rotated, and value, `[rows, kv_heads, tokens, size]`.
        scaling: of the products of queries and keys.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float


@contextmanager
def recorded(module: Any) -> Iterator[list[Inputs]]:
    """While open, the inputs of every call of a softmax attention layer are added to the list. For causal texts without
    padding and without a cache."""
    _attention_functions().register(_RECORDING, _record)
    config, inputs = module.config, list[Inputs]()
    module.config = copy.copy(config)
    module.config._attn_implementation = _RECORDING
    module.__dict__["_recorded"] = inputs
    try:
        yield inputs
    finally:
        del module.__dict__["_recorded"]
        module.config = config


def _record(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    module._recorded.append(Inputs(query.detach(), key.detach(), value.detach(), scaling))
    return _attention_functions()["sdpa"](module, query, key, value, *args, **kwargs)


def heads_of(module: Any) -> Heads:
    """The heads of an attention layer of transformers.

    Raises LinearAttentionError if it does not say them as transformers' own layers do.
    """
    size, group = getattr(module, "head_dim", None), getattr(module, "num_key_value_groups", None)
    projection = getattr(module, "k_proj", None)
    rows = getattr(projection, "out_features", None)
    if not (isinstance(size, int) and isinstance(group, int) and isinstance(rows, int)):
        raise LinearAttentionError(
            f"{type(module).__name__} does not compute queries, keys and values in the standard way (`q_proj`, "
            "`k_proj`, `v_proj`, `head_dim`), so it cannot be made linear."
        )
    return Heads(group * (rows // size), rows // size, size)


def is_attention(module: nn.Module) -> bool:
    """Whether a module looks like a causal self-attention layer with transformers' interface."""
    return isinstance(getattr(module, "layer_idx", None), int) and getattr(module, "is_causal", None) is True
