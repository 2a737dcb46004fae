"""Tensors of a checkpoint that the model does not read: harmless ones, and ones that make it wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from shiftadd_cli.errors import SourceError
from shiftadd_cli.sizes import size
from shiftadd_cli.source.checkpoint import TensorHeader

# Buffers that older versions of transformers, llama.cpp and others stored. Every model computes them itself.
_COMPUTED = re.compile(
    r"(^|\.)((rotary_emb|rotary_pos_emb)\.(original_)?inv_freq|rope\.freqs|attn_rot_embd\.weight|masked_bias|position_ids)$"
)
_ADAPTER = re.compile(r"(^|\.)(lora_\w+|base_layer|modules_to_save)(\.|$)")
_PREDICTION = re.compile(r"(^|\.)(mtp|nextn)(\w*)(\.|$)")
# Settings with the number of layers for predicting more than one token.
_PREDICTION_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "mtp_num_layers")
_MULTIPLE_TOKENS = "for predicting several tokens at once"


@dataclass(frozen=True)
class LeftBehind:
    """Tensors that the model does not read.

    part: the name that they would have in the model, or the common prefix of these names. tensors: their number.
    nbytes: their size in the file. reason: why they are not read.
    """

    part: str
    tensors: int
    nbytes: int
    reason: str

    def __str__(self) -> str:
        return f"{self.part} ({self.tensors} tensor{'s' * (self.tensors != 1)}, {size(self.nbytes)}, {self.reason})"


def left_behind(
    model: Any, stored: Mapping[str, TensorHeader], unread: Mapping[str, str], spec: str
) -> tuple[LeftBehind, ...]:
    """The tensors of a checkpoint that its model does not read, one entry per part that the model lacks.

    stored: all tensors of the checkpoint. unread: the names of the unread ones, and the corresponding names in the
    model. spec: the model as the user named it, for messages.

    Buffers that the model computes itself are no loss and are not listed. The same holds for tensors inside its
    modules that transformers may ignore.

    Raises:
        SourceError: tensors belong to an existing module of the model, so its results would be wrong without them.
    """
    computed = {name for name, _ in model.named_buffers()}
    modules = dict(model.named_modules())
    unread = {key: _with_outer_names(model, target) for key, target in unread.items()}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    rest = {key: target for key, target in unread.items() if target not in computed and not _COMPUTED.search(target)}
    inside = {key: target for key, target in rest.items() if _belongs(modules, target)}
    wrong = [key for key, target in inside.items() if not any(p.search(key) or p.search(target) for p in ignored)]
    if wrong:
        raise SourceError(
            f"{spec} holds {len(wrong)} tensors for modules of {type(model).__name__} that the model does not read "
            f"({_named(wrong)}), so its results would be wrong; weights and config.json do not belong together."
        )
    groups: dict[str, list[str]] = {}
    for key, target in rest.items():
        if key not in inside:
            groups.setdefault(_missing_part(modules, target), []).append(key)
    return tuple(
        LeftBehind(target, len(keys), sum(stored[key].nbytes for key in keys), _reason(model, modules, target))
        for target, keys in groups.items()
    )


def refuse_adapter(unread: Mapping[str, str], spec: str) -> None:
    """Raise SourceError that names the cure if tensors of an adapter (LoRA) are among the `unread` ones."""
    if adapter := [key for key, target in unread.items() if _ADAPTER.search(target)]:
        raise SourceError(
            f"{spec} holds {len(adapter)} tensors of an adapter (first: {adapter[0]}); merge it into its base model "
            "first, and give the merged model."
        )


def without_prediction(config: Any, behind: tuple[LeftBehind, ...]) -> None:
    """Set the number of layers for predicting several tokens at once to 0 in `config` if they are left behind."""
    if any(left.reason == _MULTIPLE_TOKENS for left in behind):
        for part in (config, config.get_text_config()):
            for name in _PREDICTION_COUNTS:
                if getattr(part, name, None):
                    setattr(part, name, 0)


def wrapper(unread: Mapping[str, str]) -> str | None:
    """The component that torch.compile or a parallel wrapper added to the names of all tensors; None if none did."""
    for part in ("_orig_mod", "module", "_fsdp_wrapped_module"):
        if unread and all(part in key.split(".") for key in unread):
            return part
    return None


def _with_outer_names(model: Any, target: str) -> str:
    """A name as in the model. The checkpoint may store it with or without the name of the model's main part."""
    prefix = model.base_model_prefix
    first, _, rest = target.partition(".")
    main = getattr(model, prefix, None) if prefix else None
    if isinstance(main, nn.Module) and not hasattr(model, first) and hasattr(main, first):
        return f"{prefix}.{target}"
    return rest if first == prefix and main is None and rest else target


def _belongs(modules: Mapping[str, nn.Module], target: str) -> bool:
    """Whether a tensor would take part in the computation of an existing module: it is in a block, or next to the
    parameters of a module without children."""
    around = [modules[name] for name in (*_outer_names(target), target) if name in modules]
    in_block = any(isinstance(outer, nn.ModuleList) for outer in around[:-1])
    inner = around[-1]
    is_leaf = next(inner.children(), None) is None
    return in_block or (is_leaf and any(True for _ in inner.parameters(recurse=False)))


def _outer_names(target: str) -> Iterator[str]:
    """The names of the modules around a tensor, starting with the model itself."""
    parts = target.split(".")
    for end in range(len(parts)):
        yield ".".join(parts[:end])


def _missing_part(modules: Mapping[str, nn.Module], target: str) -> str:
    """The outermost missing module around a tensor, such as `model.visual` for a tower; else the tensor's name."""
    return next((name for name in _outer_names(target) if name not in modules), target)


def _reason(model: Any, modules: Mapping[str, nn.Module], target: str) -> str:
    if _PREDICTION.search(target):
        return _MULTIPLE_TOKENS
    outer, _, leaf = target.rpartition(".")
    blocks = modules.get(outer)
    if isinstance(blocks, nn.ModuleList) and leaf.isdecimal():
        config = model.config.get_text_config()
        extra = next((count for name in _PREDICTION_COUNTS if (count := getattr(config, name, None))), 0)
        if int(leaf) < len(blocks) + extra:
            return _MULTIPLE_TOKENS
        return f"beyond the {len(blocks)} layers of the configuration"
    return f"no part of {type(model).__name__}"


def _named(keys: list[str]) -> str:
    shown = ", ".join(keys[:3])
    return shown if len(keys) <= 3 else f"{shown} and {len(keys) - 3} more"
