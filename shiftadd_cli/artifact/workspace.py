"""The hidden folder beside the output in which an artifact is built, and which outlives a run that was stopped.

.OUT.partial/
  lock         held by the run at work
  artifact/    what becomes OUT
  journal/     what is finished, see `storage.record_file`
  states/      hidden states and token weights, for the run that goes on
  old/         for a moment, what OUT was before
  failure      what the run failed of, if a fault of the program or the machine ended it
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

# Records of a run that has finished nothing.
_BEGUN = 1
# After these the same command can go on as after an interrupt, once the cause is gone.
_CURABLE = (OutputError, TeamError, ResumeError)


class Workspace:
    """`.OUT.partial`, locked while it is entered. What the system refuses raises OutputError.

    Left without `publish`, it is removed, unless its journal says more than that a run began: then the same command can
    go on. It is removed too after an error of ours that the same command would raise again. `resume=False` removes
    what an earlier run left. Entering raises OutputError where another run is at work, and ResumeError where the
    journal is damaged.

    failure: what the run that left it failed of; None where it was interrupted, or is new. A run that failed must not
    keep the next from being tried with other options, see `start_anew`.
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
        # Without its artifact, a journal is what was left to remove of a run that had finished.
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
        """Drop what an earlier run left; what is entered stays entered."""
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
        """Rename `artifact` to `out`; what was there goes only when the new one is in its place."""
        with refusals(self.out):
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
        """The lock goes last: whoever waits for it finds a folder that is empty, or none."""
        if self._lock is None or not self.folder.exists():
            return
        if self._old.exists() and not self.out.exists():
            # `publish` could rename neither the new one nor the old one back; the next run will.
            return
        self._empty()
        (self.folder / "lock").unlink(missing_ok=True)
        for folder in (self.folder, *self._created):
            try:
                folder.rmdir()
            except OSError:  # another run has begun there
                return

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _locked(folder: Path, out: Path) -> int:
    """Descriptor of the folder's lock file, locked until it is closed, however the process ends."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # a run that ended removed the folder just now
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
