"""Models that decode token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from artifacts import COMMON, Checkpoint, write_checkpoint
from tiny_models import VOCAB_SIZE, tiny_model
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

Between = Callable[[PreTrainedModel, DynamicCache], None]

_ROTATED = COMMON.replaced(rotation="hadamard", offset=True)


def write_decoders(families: Iterable[str], folder: Path) -> dict[str, Checkpoint]:
    """A small compressed model of each family, with layers in different formats."""
    return {
        name: write_checkpoint(tiny_model(name), folder / name, common=_ROTATED, own={"k_proj": COMMON}, tables=True)
        for name in families
    }


def decode_in_parts(model: PreTrainedModel, parts: Sequence[int]) -> Tensor:
    """Logits `[tokens, vocabulary]` of the tokens after a prompt, which the model reads in parts of these lengths."""
    ids = torch.randint(0, VOCAB_SIZE, (1, 9 + sum(parts)), generator=torch.Generator().manual_seed(1))
    prompt, *rest = ids.split([9, *parts], dim=1)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
        logits = [model(part, past_key_values=cache).logits[0] for part in rest]
    return torch.cat(logits).float()


def decode(
    model: PreTrainedModel, rows: int = 1, tokens: int = 6, between: Between | None = None, **options: object
) -> Tensor:
    """Logits `[tokens, rows, vocabulary]` of tokens after a prompt; calls `between` after half of them."""
    ids = torch.randint(0, VOCAB_SIZE, (rows, 9), generator=torch.Generator().manual_seed(1))
    following = torch.randint(0, VOCAB_SIZE, (tokens, rows, 1), generator=torch.Generator().manual_seed(2))
    cache = DynamicCache(config=model.config)
    logits = []
    with torch.no_grad():
        model(ids, past_key_values=cache)
        for number, token in enumerate(following):
            if number == tokens // 2 and between is not None:
                between(model, cache)
            logits.append(model(token, past_key_values=cache, **options).logits[:, -1])
    return torch.stack(logits).float()
