"""Stopping a run: when an interrupt may come, and what a request to terminate becomes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where Python runs as SIGINT raises KeyboardInterrupt."""


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM raise Terminated inside, so that what is begun is left in order. For the main thread."""

    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back SIGINT and SIGTERM until the end, for a write that is worth finishing.

    Python runs handlers of signals in its main thread alone, so elsewhere there is nothing to hold back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda got, _: held.append(got))
    try:
        yield
    finally:
        for number, handler in before.items():
            # A handler that was not set from Python cannot be put back as it was.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if held:
            signal.raise_signal(held[0])
