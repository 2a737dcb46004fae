"""The longest text that a language model can read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shiftadd_cli.errors import RecipeError

# Names of the limit in configurations; transformers maps most other names to the first.
_NAMES = ("max_position_embeddings", "max_seq_len", "max_target_positions")
# Position tables of these models start at the row after that of the padding token.
_BEHIND_PADDING = (
    "camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip


def position_limit(config: Any) -> int | None:
    """Length in tokens of the longest text for a model of this configuration; None if there is no limit.

    A table of positions has an end. Rotary positions do not, but the model was not trained beyond the limit of its
    configuration, times the scaling factor of its positions. A sliding window does not limit the text. ALiBi has no
    limit unless its biases are kept in a table, as in MPT.
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
    """The length of windows that all models can read: `asked` tokens, or the default shortened to the limits.

    limits: the result of `position_limit`, by the name of the model.

    Raises:
        RecipeError: `asked` is beyond a limit; the message names the model and `option`.
    """
    finite = {name: limit for name, limit in limits.items() if limit is not None}
    if not finite:
        return default if asked is None else asked
    name = min(finite, key=finite.__getitem__)
    if asked is None:
        return min(default, finite[name])
    if asked > finite[name]:
        raise RecipeError(
            f"A window of {asked:,} tokens is longer than the {finite[name]:,} positions of {name}; give {option} "
            f"{finite[name]} or less."
        )
    return asked


def _scaled_lengths(text: Any, limit: int) -> list[float]:
    """The lengths covered by scaled rotary positions; settings may differ by type of layer."""
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
