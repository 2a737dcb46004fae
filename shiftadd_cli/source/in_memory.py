"""A model that a program has in memory, as a folder that can be opened like any other."""

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
    """What to open a model by: its name, or of one in memory a folder beside `near` that is removed in the end.

    processor: the tokenizer or image processor of a model in memory.

    Raises OutputError where the folder cannot be written.
    """
    if not isinstance(model, PreTrainedModel):
        yield str(model)
        return
    place = next(each for each in near.resolve().parents if each.is_dir())
    with ExitStack() as stack:
        # What goes wrong while the folder is used is not its fault.
        with refusals(place):
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix=".shiftadd-", dir=place))
            # The last part of its path is what the model is called.
            folder = Path(scratch) / type(model).__name__
            model.save_pretrained(folder)
            if processor is not None:
                processor.save_pretrained(folder)
        yield str(folder)
