"""The hidden folder next to the output where an artifact is built. It outlives a stopped run.

.OUT.partial/
  lock         held by the active run
  artifact/    becomes OUT
  journal/     finished steps, see `storage.record_file`
  states/      hidden states and token weights, for a resumed run
  old/         the previous OUT, for a moment
  failure      why the run failed, if a fault of the program or the machine ended it
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType

from shiftadd_cli.artifact.output import partial_folder
from shiftadd_cli.errors import OutputError, ResumeError, ShiftaddError, SourceError, TeamError, first_line
from shiftadd_cli.storage.durable import sync
from shiftadd_cli.storage.record_file import Journal
from shiftadd_cli.storage.refusals import refusals

# Number of records of a run that has finished nothing.
_BEGUN = 1
# After these errors the same command can resume, as after an interrupt, once the cause is gone.
_CURABLE = (OutputError, TeamError, ResumeError)


class Workspace:
    """`.OUT.partial`, locked while it is entered. Raises OutputError if the system refuses an operation.

    Leaving without `publish` removes it, unless its journal says more than that a run began: then the same command can
    resume. It is also removed after an error of ours that the same command would raise again. `resume=False` removes
    the files of an earlier run. Entering raises OutputError if another run is active, and ResumeError if the journal
    is damaged.

    failure: why the earlier run failed; None if it was interrupted, or there was none. A failed run must not keep the
    next from trying other options, see `start_anew`.
    """

    def __init__(self, out: Path, *, resume: bool = True) -> None:
        self.out = out.resolve()
        self.resume = resume
        self.folder = partial_folder(self.out)
        self.artifact, self.states, self._old = (self.folder / name for name in ("artifact", "states", "old"))
        self._created: list[Path] = []
        self._lock: int | None = None
        self.failure: str | None = None

    def __enter__(self) -> Workspace:
        self._created = [folder for folder in self.out.parents if not folder.exists()]
        with refusals(self.out):
            self._lock = _locked(self.folder, self.out)
            try:
                self._open()
            except BaseException:
                self._unlock()
                raise
        return self

    def _open(self) -> None:
        if self._old.exists() and not self.out.exists():
            # Killed between the two renames of `publish`.
            os.rename(self._old, self.out)
        # A journal without an artifact is a leftover of a finished run.
        if not self.resume or not self.artifact.is_dir():
            self._empty()
        self.journal = Journal(self.folder / "journal")
        if len(self.journal) <= _BEGUN:
            self._empty()
            self.journal = Journal(self.folder / "journal")
        self.artifact.mkdir(exist_ok=True)
        self.failure = self._failed.read_text(encoding="utf-8") if self._failed.is_file() else None

    @property
    def _failed(self) -> Path:
        return self.folder / "failure"

    def start_anew(self) -> None:
        """Drop the files of an earlier run; the workspace stays entered."""
        with refusals(self.out):
            self._empty()
            self.artifact.mkdir()
        self.journal, self.failure = Journal(self.folder / "journal"), None

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        ours = isinstance(value, ShiftaddError) and not isinstance(value, (*_CURABLE, SourceError))
        if len(self.journal) <= _BEGUN or ours:
            self._remove()
        elif isinstance(value, Exception) and not isinstance(value, _CURABLE):
            self._failed.write_text(first_line(value), encoding="utf-8")
        elif not isinstance(value, ResumeError):
            self._failed.unlink(missing_ok=True)
        self._unlock()

    def publish(self, *, overwrite: bool) -> None:
        """Rename `artifact` to `out` once all its files are on disk; an old `out` is removed only after that."""
        with refusals(self.out):
            for path in self.artifact.rglob("*"):
                if path.is_file():
                    sync(path)
            sync(self.artifact)
            if self.out.exists() and any(self.out.iterdir()):
                if not overwrite:
                    raise FileExistsError(f"{self.out} appeared meanwhile")
                os.rename(self.out, self._old)
            try:
                os.rename(self.artifact, self.out)
            except BaseException:
                if self._old.exists():
                    os.rename(self._old, self.out)
                raise
            sync(self.out.parent)
            self._remove()

    def _empty(self) -> None:
        for path in self.folder.iterdir():
            if path.name != "lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _remove(self) -> None:
        """Remove the folder, the lock last: a run that waits for it finds an empty folder, or none."""
        if self._lock is None or not self.folder.exists():
            return
        if self._old.exists() and not self.out.exists():
            # `publish` could neither move the new folder in nor the old one back; the next run restores it.
            return
        self._empty()
        (self.folder / "lock").unlink(missing_ok=True)
        for folder in (self.folder, *self._created):
            try:
                folder.rmdir()
            except OSError:  # another run has started there
                return

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _locked(folder: Path, out: Path) -> int:
    """Descriptor of the folder's lock file; the lock lasts until it is closed, however the process ends."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # a finished run has just removed the folder
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), os.stat(folder / "lock")):
                return lock
        except BlockingIOError:
            os.close(lock)
            raise OutputError(f"Another run is writing {out}; wait until it ends, or choose another folder.") from None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
