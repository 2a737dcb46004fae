"""Who is at fault when a process of a team has to give up: every process shows the others that it lives.

In the store that torch.distributed starts with, each process counts up once a second and says how many exchanges of
all it has begun. When an exchange fails, or takes longer than the limit, the process at fault is one that said why it
leaves; or else one that counts no longer; or else the one that is furthest behind.
"""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import dataclass

import torch.distributed as dist

_BEAT_SECONDS = 1.0
# A process that is alive has counted on in this time, on a busy machine too.
_LOOK_SECONDS = 5.0


@dataclass(frozen=True)
class _Sign:
    """What a process last showed: its machine, how often it has counted, and how many exchanges it has begun."""

    host: str
    beats: int
    steps: int


class Watch:
    """Of process `rank` among `size`, through `store`. Counts from `start` to `stop`."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._host = socket.gethostname()
        self._steps = 0
        self._ended = threading.Event()
        # In a thread and over a connection of its own: it must go on while an exchange blocks.
        self._thread = threading.Thread(target=self._count, name="shiftadd-watch", daemon=True)

    def start(self) -> None:
        """Begin to show that this process lives."""
        self._show(self._store, 0)
        self._thread.start()

    def stop(self) -> None:
        """End it; for a process that has nothing more to say."""
        self._ended.set()
        self._thread.join()

    def step(self) -> None:
        """An exchange in which all take part begins."""
        self._steps += 1

    def leave(self, reason: str) -> None:
        """Tell the others why this process leaves them: a sentence, or nothing where it was told to."""
        try:
            self._store.set(_key("left", self._rank), reason)
        except RuntimeError:
            # Whoever holds the store is gone before; the others learn that from it.
            return

    def reason(self) -> str | None:
        """Which other process is at fault, in a sentence; None where all go on."""
        try:
            before = self._signs()
            time.sleep(_LOOK_SECONDS)
            after = self._signs()
            left = {rank: self._left(rank) for rank in after}
        except RuntimeError:
            return "The process that the others are connected through no longer answers."
        others = [rank for rank in after if rank != self._rank]
        for rank in others:
            if left[rank]:
                return f"{_name(rank, after[rank])} has stopped: {left[rank]}"
        # Those that were told to leave are not to blame.
        others = [rank for rank in others if left[rank] is None]
        for rank in others:
            if after[rank].beats == before[rank].beats:
                return f"{_name(rank, after[rank])} no longer answers."
        behind = min(others, key=lambda rank: after[rank].steps, default=self._rank)
        if behind != self._rank and after[behind].steps < self._steps:
            return f"{_name(behind, after[behind])} did not come to an exchange that the others wait at."
        return None

    def _count(self) -> None:
        store = self._store.clone()  # type: ignore[attr-defined] # lacking in torch's stubs
        beats = 0
        while not self._ended.wait(_BEAT_SECONDS):
            beats += 1
            try:
                self._show(store, beats)
            except RuntimeError:
                return

    def _show(self, store: dist.Store, beats: int) -> None:
        store.set(_key("sign", self._rank), f"{self._host} {beats} {self._steps}")

    def _signs(self) -> dict[int, _Sign]:
        signs = {}
        for rank in range(self._size):
            if self._store.check([_key("sign", rank)]):
                host, beats, steps = self._store.get(_key("sign", rank)).decode().split()
                signs[rank] = _Sign(host, int(beats), int(steps))
        return signs

    def _left(self, rank: int) -> str | None:
        """What a process said when it left; None for one that is there."""
        key = _key("left", rank)
        return self._store.get(key).decode() if self._store.check([key]) else None


def _key(what: str, rank: int) -> str:
    return f"shiftadd/{what}/{rank}"


def _name(rank: int, sign: _Sign) -> str:
    return f"Process {rank} of the team (on {sign.host})"
