"""How long a text a language model can read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shiftadd_cli.errors import RecipeError

# What configurations call the limit; most other names are mapped to the first by transformers.
_NAMES = ("max_position_embeddings", "max_seq_len", "max_target_positions")
# The tables of these count from the row behind that of the padding token.
_BEHIND_PADDING = (
    "camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip


def position_limit(config: Any) -> int | None:
    """Tokens of the longest text for a model of this configuration; None where the architecture has no limit.

    A table of positions has an end. Rotary positions have none, but the model was not trained beyond the limit of its
    configuration, times the factor by which its positions are scaled. A sliding window limits no text. ALiBi has no
    limit unless its biases are kept in a table, as MPT's are.
    """
    text = config.get_text_config()
    named = (getattr(text, name, None) for name in _NAMES)
    limit = next((value for value in named if isinstance(value, int) and value > 0), None)
    if limit is None or getattr(text, "alibi", False):
        return None
    if text.model_type in _BEHIND_PADDING:
        return limit - text.pad_token_id - 1
    return max([limit, *(int(length) for length in _scaled_lengths(text, limit))])


def window_length(asked: int | None, default: int, limits: Mapping[str, int | None], option: str) -> int:
    """The length of windows that all models can read: what is asked for, or the default shortened to the limits.

    limits: of `position_limit`, by the name of the model.

    Raises:
        RecipeError: what is asked for is beyond a limit; it names the model and `option`.
    """
    known = {name: limit for name, limit in limits.items() if limit is not None}
    if not known:
        return default if asked is None else asked
    name = min(known, key=known.__getitem__)
    if asked is None:
        return min(default, known[name])
    if asked > known[name]:
        raise RecipeError(
            f"A window of {asked:,} tokens is longer than the {known[name]:,} positions of {name}; give {option} "
            f"{known[name]} or less."
        )
    return asked


def _scaled_lengths(text: Any, limit: int) -> list[float]:
    """The lengths that scaled rotary positions reach; settings may differ by the type of layer."""
    settings = getattr(text, "rope_parameters", None) or {}
    if "rope_type" not in settings:
        kinds = [value for value in settings.values() if isinstance(value, dict)]
    else:
        kinds = [settings]
    return [
        factor * (kind.get("original_max_position_embeddings") or limit)
        for kind in kinds
        if isinstance(factor := kind.get("factor"), (int, float)) and kind.get("rope_type") != "default"
    ]
