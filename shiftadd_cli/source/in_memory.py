"""Saves a model in memory to a folder, so that it can be opened like any other."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from shiftadd_cli.storage.refusals import refusals


@contextmanager
def as_folder(model: str | Path | PreTrainedModel, processor: Any, near: Path) -> Iterator[str]:
    """The name to open a model by: its own, or for one in memory a temporary folder next to `near`.

    processor: the tokenizer or image processor of a model in memory.

    Raises OutputError if the folder cannot be written.
    """
    if not isinstance(model, PreTrainedModel):
        yield str(model)
        return
    parent = next(folder for folder in near.resolve().parents if folder.is_dir())
    with ExitStack() as stack:
        # Errors during the use of the folder must not become OutputError.
        with refusals(parent):
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix=".shiftadd-", dir=parent))
            # The last part of the path becomes the name of the model.
            folder = Path(scratch) / type(model).__name__
            model.save_pretrained(folder)
            if processor is not None:
                processor.save_pretrained(folder)
        yield str(folder)
