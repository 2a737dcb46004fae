"""The effect of one layer alone: the divergence of the model with only that layer replaced by its compressed form."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from shiftadd_cli.data.text import load_text, text_windows, tokenise
from shiftadd_cli.evaluation.perplexity import score_models
from shiftadd_cli.runtime.opened import load_any
from shiftadd_cli.source import LinearSpec


def sample_layers(linears: Sequence[LinearSpec], blocks: int) -> list[str]:
    """Names of the linears of `blocks` blocks, evenly spaced from the first to the last: every kind at every depth."""
    last = max(spec.block for spec in linears)
    chosen = {round(last * index / max(blocks - 1, 1)) for index in range(blocks)}
    return [spec.name for spec in linears if spec.block in chosen]


def losses_alone(
    model: str, artifact: str, names: Sequence[str], dataset: str, context: int, max_tokens: int | None, dtype: str
) -> dict[str, float]:
    """KL(original || model) in nats per token, by the name of the only linear that comes from the artifact.

    The artifact's layers were fitted in sequence, on the outputs of the compressed layers before them; here each layer
    reads the inputs of the original. All variants share the original's tensors and see the same batches.
    """
    original, compressed = load_any(model, dtype), load_any(artifact, dtype)
    tokens = tokenise(load_text(dataset, split="test").text, original.tokenizer)[:max_tokens]
    windows = text_windows(tokens, original.tokenizer, context, "--context")
    variants = [(name, _with_layer(original.model, compressed.model, name)) for name in names]
    scores, _ = score_models(variants, windows, original=("original", original.model), show_progress=False)
    return {name: score.kl for name, score in zip(names, scores, strict=True) if score.kl is not None}


def _with_layer(original: nn.Module, compressed: nn.Module, name: str) -> Any:
    """A copy of the original that shares all its tensors, with one module of the compressed model."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*original.parameters(), *original.buffers())}
    variant = copy.deepcopy(original, shared)
    parent, _, child = name.rpartition(".")
    setattr(variant.get_submodule(parent), child, compressed.get_submodule(name))
    return variant
