"""Signals wait for a write that is worth finishing, and a request to terminate unwinds as an interrupt does."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from shiftadd_cli.signals import Terminated, terminable, uninterrupted


@pytest.fixture(autouse=True)
def listening() -> Iterator[None]:
    """A process that a shell began in the background ignores SIGINT, and so would its tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_signal_comes_after_what_must_not_be_interrupted(number: int, kind: type[BaseException]) -> None:
    done = []
    with pytest.raises(kind), terminable():  # noqa: PT012 - what happens before is the point
        with uninterrupted():
            signal.raise_signal(number)
            done.append("write")
        done.append("more")
    assert done == ["write"]


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with terminable(), uninterrupted():
        pass
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_other_threads_have_nothing_to_hold_back() -> None:
    done = []

    def work() -> None:
        with uninterrupted():
            done.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [signal.getsignal(signal.SIGINT)]
