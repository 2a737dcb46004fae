"""Signals wait for writes that should finish, and SIGTERM unwinds the stack as an interrupt does."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from shiftadd_cli.signals import Terminated, terminable, uninterrupted


@pytest.fixture(autouse=True)
def listening() -> Iterator[None]:
    """Handle SIGINT even if a shell started this process in the background, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_signal_waits_for_the_uninterrupted_section(number: int, kind: type[BaseException]) -> None:
    steps = []
    with pytest.raises(kind), terminable():  # noqa: PT012 - the steps before the signal matter
        with uninterrupted():
            signal.raise_signal(number)
            steps.append("write")
        steps.append("more")
    assert steps == ["write"]


def test_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with terminable(), uninterrupted():
        pass
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_other_threads_defer_nothing() -> None:
    handlers = []

    def work() -> None:
        with uninterrupted():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]
