"""The tokenizer of a source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shiftadd_cli.errors import SourceError, first_line


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
    except Exception as error:  # converters raise whatever the file at hand leads them to
        reason = first_line(error)
        raise SourceError(
            f"{path} holds no tokenizer that can be read ({reason}); add the tokenizer files of the original model."
        ) from error
    if len(tokenizer) == 0:
        raise SourceError(f"{path} holds no tokenizer; put the tokenizer files of the original model there.")
    return tokenizer
