"""Scaled rotary positions of a GGUF file, which transformers does not read."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from shiftadd_cli.errors import SourceError
from shiftadd_cli.source.gguf_header import GgufFile, GgufTensor

FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = frozenset({FREQUENCIES, LONG, SHORT})
_FLOAT32 = 0
# For Llama 3.1, llama.cpp does not write these numbers but the frequency divisors computed from them.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_TOLERANCE = 1e-5
# Settings that have no effect at these values.
_NEUTRAL = {"finetuned": None, "yarn_ext_factor": 1.0, "yarn_attn_factor": 1.0}


def read_rope(config: Any, file: GgufFile) -> None:
    """Copy the scaling of rotary positions from `file` to `config.rope_parameters`.

    llama.cpp keeps it in metadata (`rope.scaling`), or in tensors if every frequency has its own divisor.

    Raises:
        SourceError: transformers has no setting for this kind of scaling.
    """
    tensors = {tensor.name: tensor for tensor in file.tensors if tensor.name in ROPE_TENSORS}
    settings = _settings(file)
    kind = settings.pop("type", "linear" if settings.get("factor", 1.0) != 1.0 else "none")
    scaled = kind in ("linear", "yarn") and settings.get("factor", 1.0) not in (0.0, 1.0)
    if not tensors and not scaled and kind in ("none", "linear", "yarn") and settings.get("attn_factor", 1.0) == 1.0:
        return
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict):
        raise _unknown(file, "and the model has no setting for it")
    layers = [name for name, value in rope.items() if isinstance(value, dict)]
    if layers and "full_attention" not in layers:
        raise _unknown(file, f"for layers of {len(layers)} kinds")
    layer = "full_attention" if layers else None
    own = rope[layer] if layer is not None else rope
    if tensors and scaled:
        raise _unknown(file, f"both as {kind} and in {', '.join(sorted(tensors))}")
    if FREQUENCIES in tensors and len(tensors) == 1:
        divisors = _read(file, tensors[FREQUENCIES])
        if _same(_frequencies(config, layer), _default(config, own, len(divisors)) / divisors):
            return
        if layer is not None:
            raise _unknown(file, f"in {FREQUENCIES}, for layers of {len(layers)} kinds")
        config.rope_parameters = _from_divisors(config, own, divisors)
    elif tensors.keys() == {LONG, SHORT} and layer is None:
        long, short = (_read(file, tensors[name]).tolist() for name in (LONG, SHORT))
        scaling: dict[str, Any] = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
        original = int(settings.get("original_context_length", config.max_position_embeddings))
        scaling |= {"original_max_position_embeddings": original, "factor": config.max_position_embeddings / original}
        scaling["attention_factor"] = float(settings.get("attn_factor", 1.0))
        config.rope_parameters = _base(own) | scaling
        if hasattr(config, "original_max_position_embeddings"):
            config.original_max_position_embeddings = original
    elif scaled:
        scaling = _from_settings(file, kind, settings, config)
        if all(own.get(name) == value for name, value in scaling.items()):
            return
        changed = (own if own.get("rope_type") == kind else _base(own)) | scaling
        config.rope_parameters = changed if layer is None else rope | {layer: changed}
    else:
        raise _unknown(file, f"of the type {kind!r}, in {', '.join(sorted(tensors)) or 'metadata'}")


def _settings(file: GgufFile) -> dict[str, Any]:
    prefix = f"{file.architecture}.rope.scaling."
    settings = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    # The name in older files.
    if (factor := file.metadata.get(f"{file.architecture}.rope.scale_linear")) is not None:
        settings.setdefault("factor", factor)
    return settings


def _from_settings(file: GgufFile, kind: str, settings: dict[str, Any], config: Any) -> dict[str, Any]:
    supported = {"factor", "original_context_length", *(("yarn_beta_fast", "yarn_beta_slow") if kind == "yarn" else ())}
    for name, value in settings.items():
        if name not in supported and not (name in _NEUTRAL and _NEUTRAL[name] in (None, value)):
            raise _unknown(file, f"with the setting {name}")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": float(settings["factor"])}
    if kind == "yarn":
        original = settings.get("original_context_length", config.max_position_embeddings)
        scaling["original_max_position_embeddings"] = int(original)
        scaling |= {name.removeprefix("yarn_"): float(settings[name]) for name in settings if "beta" in name}
    return scaling


def _from_divisors(config: Any, own: dict[str, Any], divisors: torch.Tensor) -> dict[str, Any]:
    """The settings of Llama 3 if they give these divisors; else a form that takes divisors directly."""
    default = _default(config, own, len(divisors))
    before = config.rope_parameters
    config.rope_parameters = _base(own) | {"rope_type": "llama3", "factor": float(divisors.max())} | _LLAMA3
    if _same(_frequencies(config, None), default / divisors):
        llama3: dict[str, Any] = config.rope_parameters
        return llama3
    config.rope_parameters = before
    factors = divisors.tolist()
    return _base(own) | {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": config.max_position_embeddings,
    }


def _base(own: dict[str, Any]) -> dict[str, Any]:
    return {name: own[name] for name in ("rope_theta", "partial_rotary_factor") if name in own}


def _default(config: Any, own: dict[str, Any], count: int) -> torch.Tensor:
    """Frequencies without scaling, float64 `[count]`."""
    theta = own.get("rope_theta") or config.default_theta
    return theta ** -(torch.arange(count, dtype=torch.float64) / count)


def _frequencies(config: Any, layer: str | None) -> torch.Tensor | None:
    """Frequencies of the configuration, `[half the rotary dimensions]`; None if only the model computes them."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters if layer is None else config.rope_parameters[layer]
    function = ROPE_INIT_FUNCTIONS.get(rope.get("rope_type", "default"))
    if function is None:
        return None
    values, _ = function(config, layer_type=layer)
    return values.double()


def _same(one: torch.Tensor | None, other: torch.Tensor) -> bool:
    # A divisor of 1e30 means a frequency of zero.
    return one is not None and one.shape == other.shape and torch.allclose(one, other, rtol=_TOLERANCE, atol=1e-20)


def _read(file: GgufFile, tensor: GgufTensor) -> torch.Tensor:
    """Read a float32 tensor of positive numbers, as float64 `[frequencies]`."""
    values = np.fromfile(tensor.path, dtype=np.float32, count=math.prod(tensor.shape), offset=tensor.offset)
    if tensor.kind != _FLOAT32 or len(tensor.shape) != 1 or not (values > 0).all():
        raise _unknown(file, f"in {tensor.name}, which does not hold one positive number for each frequency")
    return torch.from_numpy(values).double()


def _unknown(file: GgufFile, how: str) -> SourceError:
    return SourceError(
        f"{file.path} scales its rotary positions {how}, which cannot be read from GGUF here; give the model as a "
        "safetensors folder."
    )
