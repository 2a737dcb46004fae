"""Attention layers made linear one by one: their fits, what each costs the model, and what it saves in the cache."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from shiftadd_cli.data.windows import Windows, cut_windows
from shiftadd_cli.errors import LinearAttentionError
from shiftadd_cli.evaluation.perplexity import score_models
from shiftadd_cli.pipeline.linearize_settings import LinearizeSettings
from shiftadd_cli.reconstruction.attention import Fit, FitSettings, fit_feature_map
from shiftadd_cli.reconstruction.optimizer import hold_back
from shiftadd_cli.runtime.linear_attention.attention import Reach
from shiftadd_cli.runtime.linear_attention.feature_maps import FeatureMap, make_map
from shiftadd_cli.runtime.linear_attention.module import (
    Inputs,
    check_cache,
    heads_of,
    is_attention,
    linearize,
    recorded,
)

# Feature maps of some layers, by the number of the layer.
Maps = Mapping[int, FeatureMap]
# Inputs of layers that are in memory at once, in bytes; those of one layer may be more.
_INPUT_BYTES = 1 << 30


def linear_candidates(model: Any) -> dict[int, Any]:
    """The attention layers that can be linear, by number. Raises LinearAttentionError if there are none."""
    candidates, refusals = {}, []
    for number, module in _attention_layers(model).items():
        try:
            heads_of(module)
            check_cache(module)
        except LinearAttentionError as refusal:
            refusals.append(str(refusal))
        else:
            candidates[number] = module
    if not candidates:
        raise LinearAttentionError(
            refusals[0]
            if refusals
            else f"{type(model).__name__} has no attention layers with the interface of transformers, so there is "
            "nothing to make linear."
        )
    return candidates


def _attention_layers(model: Any) -> dict[int, Any]:
    return {module.layer_idx: module for module in model.modules() if is_attention(module)}


def twin(model: Any, maps: Maps, reach: Reach) -> Any:
    """The model with the layers of `maps` linear; it shares the weights of `model`."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, shared)
    for number, module in _attention_layers(copied).items():
        if number in maps:
            linearize(module, maps[number], reach)
    return copied


def fit_layers(
    model: Any, texts: Tensor, layers: Sequence[int], settings: LinearizeSettings
) -> Iterator[tuple[int, FeatureMap, Fit]]:
    """Maps of these layers, fitted on windows of tokens `[texts, tokens]`."""
    modules = linear_candidates(model)
    heads = heads_of(modules[layers[0]])
    one = texts.numel() * (heads.queries + 2 * heads.keys) * heads.size * model.dtype.itemsize
    together = max(1, _INPUT_BYTES // one)
    fit_settings = FitSettings(steps=settings.steps, seed=settings.seed)
    for start in range(0, len(layers), together):
        part = layers[start : start + together]
        for number, inputs in zip(part, _record(model, [modules[number] for number in part], texts), strict=True):
            feature_map, project = make_map(settings.map, heads_of(modules[number])), modules[number].o_proj
            yield number, feature_map, fit_feature_map(feature_map, settings.reach, inputs, project, fit_settings)


@torch.no_grad()
def _record(model: Any, modules: Sequence[Any], texts: Tensor) -> list[list[Inputs]]:
    """The inputs of these attention layers for every text."""
    with ExitStack() as stack:
        inputs = [stack.enter_context(recorded(module)) for module in modules]
        for text in texts:
            model.base_model(text[None], use_cache=False)
    return inputs


def held_back_windows(texts: Tensor) -> Windows:
    """Those of the windows `[texts, tokens]` that no fit sees."""
    _, held = hold_back(len(texts))
    return cut_windows(texts[held].flatten(), texts.shape[1])


def divergences(model: Any, choices: Sequence[Maps], reach: Reach, windows: Windows) -> list[float]:
    """KL from the original of the model with the layers of each choice linear, in nats per token."""
    twins = [("linear", twin(model, maps, reach)) for maps in choices]
    scores, _ = score_models(twins, windows, batch_size=1, original=("original", model), show_progress=len(choices) > 1)
    values = [score.kl for score in scores if score.kl is not None]
    assert len(values) == len(choices), "scored against the original"
    return values


def layer_cache_bytes(module: Any, dtype: torch.dtype, settings: LinearizeSettings, *, linear: bool) -> int:
    """Bytes that one attention layer caches for a text of `settings.context` tokens."""
    heads = heads_of(module)
    token = 2 * heads.keys * heads.size * dtype.itemsize
    if not linear:
        return settings.context * token
    state = 4 * heads.keys * make_map(settings.map, heads).features * (heads.size + 1)
    return min(settings.context, settings.window + settings.sinks) * token + state


def cache_bytes(model: Any, linear: Sequence[int], settings: LinearizeSettings) -> int:
    """Bytes that the layers which can be linear cache, if those in `linear` are."""
    return sum(
        layer_cache_bytes(module, model.dtype, settings, linear=number in linear)
        for number, module in linear_candidates(model).items()
    )
