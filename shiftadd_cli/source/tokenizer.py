"""The tokenizer of a source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shiftadd_cli.errors import SourceError, first_line

# A tokenizer that has no token for one sample may have one for the next.
_SAMPLES = ("a", "0", ".", "\u4e00")


def load_tokenizer(path: Path, *, remote_code: bool) -> Any:
    """The tokenizer of a model folder or a .gguf file.

    Raises:
        SourceError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    where = {"gguf_file": path.name} if path.is_file() else {}
    folder = path.parent if path.is_file() else path
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=remote_code, **where)
    except Exception as error:  # converters raise any exception, depending on the file
        reason = first_line(error)
        raise SourceError(
            f"{path} holds no tokenizer that can be read ({reason}); add the tokenizer files of the original model."
        ) from error
    if len(tokenizer) == 0:
        raise SourceError(f"{path} holds no tokenizer; put the tokenizer files of the original model there.")
    return tokenizer


def leading_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Ids of the special tokens that the tokenizer puts before a text by itself: often `<bos>`, or none.

    Raises:
        SourceError: it encodes the text itself differently when it adds special tokens.
    """
    for sample in _SAMPLES:
        bare, full = (tokenizer(sample, add_special_tokens=added)["input_ids"] for added in (False, True))
        if not bare:
            continue
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return tuple(full[:start])
    raise SourceError(
        f"Cannot determine which special tokens the tokenizer {type(tokenizer).__name__} puts before a text; check "
        "the post-processor in tokenizer.json."
    )


def end_tokens(settings: Any, tokenizer: Any) -> list[int]:
    """Ids of the tokens that end a text: those of the configuration or generation settings, which may name several,
    and that of the tokenizer."""
    named = getattr(settings, "eos_token_id", None)
    ends = list(named) if isinstance(named, (list, tuple)) else [named]
    return list(dict.fromkeys(end for end in (*ends, tokenizer.eos_token_id) if end is not None))


def tokens_as_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """The names of the tokens in one string; empty for no tokens."""
    return "".join(tokenizer.convert_ids_to_tokens(list(ids)))


def unknown_token(ids: Tensor | Sequence[int], tokenizer: Any, rows: int) -> str | None:
    """Name and id of the first token without a row in an embedding of `rows` rows; None if all have one."""
    ids = torch.as_tensor(ids).flatten()
    beyond = ids[ids >= rows]
    if not len(beyond):
        return None
    first = int(beyond[0])
    return f"the token {tokenizer.convert_ids_to_tokens(first)!r} (id {first:,})"
