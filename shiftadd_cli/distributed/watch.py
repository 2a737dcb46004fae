"""Heartbeats between the processes of a team, to find the process at fault when an exchange fails.

In the store of torch.distributed, each process increments a counter once a second, and publishes how many collective
exchanges it has started. When an exchange fails or times out, the process at fault is one that has left and given a
reason; or else one whose counter has stopped; or else the one furthest behind.
"""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import dataclass

import torch.distributed as dist

_BEAT_SECONDS = 1.0
# A live process increments its counter within this time, even on a busy machine.
_LOOK_SECONDS = 5.0


@dataclass(frozen=True)
class _Sign:
    """The last published state of a process: its machine, its counter, and how many exchanges it has started."""

    host: str
    beats: int
    steps: int


class Watch:
    """The heartbeat of process `rank` of `size`, through `store`. Runs from `start` to `stop`."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._host = socket.gethostname()
        self._steps = 0
        self._ended = threading.Event()
        # Its own thread and connection, because it must keep running while an exchange blocks.
        self._thread = threading.Thread(target=self._count, name="shiftadd-watch", daemon=True)

    def start(self) -> None:
        """Start the heartbeat."""
        self._show(self._store, 0)
        self._thread.start()

    def stop(self) -> None:
        """Stop the heartbeat, at the end of this process's work."""
        self._ended.set()
        self._thread.join()

    def step(self) -> None:
        """Count the start of an exchange among all processes."""
        self._steps += 1

    def leave(self, reason: str) -> None:
        """Tell the others why this process leaves: a sentence, or "" if it was asked to stop."""
        try:
            self._store.set(_key("left", self._rank), reason)
        except RuntimeError:
            # The host of the store is already gone, which the others notice as well.
            return

    def reason(self) -> str | None:
        """A sentence naming another process that is at fault; None if all are running."""
        try:
            before = self._signs()
            time.sleep(_LOOK_SECONDS)
            after = self._signs()
            left = {rank: self._left(rank) for rank in after}
        except RuntimeError:
            return "The process that connects the others no longer answers."
        others = [rank for rank in after if rank != self._rank]
        for rank in others:
            if left[rank]:
                return f"{_name(rank, after[rank])} has stopped: {left[rank]}"
        # Processes that were asked to stop are not at fault.
        others = [rank for rank in others if left[rank] is None]
        for rank in others:
            if after[rank].beats == before[rank].beats:
                return f"{_name(rank, after[rank])} no longer answers."
        behind = min(others, key=lambda rank: after[rank].steps, default=self._rank)
        if behind != self._rank and after[behind].steps < self._steps:
            return f"{_name(behind, after[behind])} did not come to an exchange that the others are waiting for."
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
        """The reason a process gave when it left; None if it has not left."""
        key = _key("left", rank)
        return self._store.get(key).decode() if self._store.check([key]) else None


def _key(kind: str, rank: int) -> str:
    return f"shiftadd/{kind}/{rank}"


def _name(rank: int, sign: _Sign) -> str:
    return f"Process {rank} of the team (on {sign.host})"
