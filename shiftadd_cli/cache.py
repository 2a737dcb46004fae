"""Results cached between runs, so that they are not computed again."""

from __future__ import annotations

import errno
import functools
import os
import sys
from pathlib import Path

from shiftadd_cli.paths import expanded
from shiftadd_cli.storage.durable import replace_file


def cache_folder() -> Path:
    """$SHIFTADD_CACHE, or `~/.cache/shiftadd`."""
    return expanded(os.environ.get("SHIFTADD_CACHE") or "~/.cache/shiftadd")


class CacheFile:
    """One file of the cache. The constructor creates its folder.

    The cache only saves time. If the folder is not writable, a warning says so once, and nothing is cached.

    Args:
        path: path of the file.
        content: plural noun for the warning, such as "sensitivities".
        loss: clause for the warning, such as "so another budget will measure them again".
    """

    def __init__(self, path: Path, *, content: str, loss: str) -> None:
        self.path, self._content, self._loss = path, content, loss
        self._usable = True
        try:
            # An unknown home folder leaves the `~` in the path.
            if path.parts[:1] and path.parts[0].startswith("~"):
                raise FileNotFoundError(errno.ENOENT, "there is no such home folder")
            path.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(path.parent, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as failure:
            self._give_up(failure)

    def read(self) -> bytes | None:
        """The content of the file; None if it is missing or unreadable."""
        try:
            return self.path.read_bytes()
        except OSError:
            return None

    def write(self, content: bytes) -> None:
        """Replace the content atomically; another process never reads a partial file."""
        if not self._usable:
            return
        try:
            replace_file(self.path, content)
        except OSError as failure:
            self._give_up(failure)

    def _give_up(self, failure: OSError) -> None:
        self._usable = False
        _warn_once(
            f"{self._content} cannot be kept in {self.path.parent} ({failure.strerror or failure}), {self._loss}; set "
            "SHIFTADD_CACHE to a folder that you can write to."
        )


@functools.cache
def _warn_once(text: str) -> None:
    """A run has several files in one folder."""
    print(f"Warning: {text}", file=sys.stderr, flush=True)
