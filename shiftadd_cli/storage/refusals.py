"""Write errors, turned into messages that name the cure."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shiftadd_cli.errors import OutputError
from shiftadd_cli.storage.durable import as_bytes, replace_file

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


def write_file(path: Path, content: bytes | str) -> None:
    """Write a small file at `path`, text as UTF-8, completely or not at all, over any existing file.

    Raises OutputError if the system refuses.
    """
    with refusals(path):
        replace_file(path, as_bytes(content))


@contextmanager
def refusals(path: Path) -> Iterator[None]:
    """Turn an OSError from writing at `path` into an OutputError that names the cure."""
    try:
        yield
    except OSError as failure:
        if failure.errno in _FULL:
            text = f"No space left to write {path}; free some space or choose another disk."
        elif failure.errno in _FORBIDDEN:
            text = f"No permission to write {path}; choose another folder."
        else:
            text = f"{path} cannot be written ({failure.strerror or failure}); choose another folder."
        raise OutputError(text) from failure
