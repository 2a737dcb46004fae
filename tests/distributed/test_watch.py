"""The process that is blamed when an exchange of its team fails."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch.distributed as dist

from shiftadd_cli.distributed import watch as watch_module
from shiftadd_cli.distributed.watch import Watch


class Store(dist.HashStore):
    """A store that is its own second connection."""

    def clone(self) -> Store:
        return self


@pytest.fixture
def watches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Watch]]:
    """The watches of three processes that count every hundredth of a second."""
    monkeypatch.setattr(watch_module, "_BEAT_SECONDS", 0.01)
    monkeypatch.setattr(watch_module, "_LOOK_SECONDS", 0.5)
    store: Any = Store()
    members = [Watch(store, rank, 3) for rank in range(3)]
    for watch in members:
        watch.start()
    yield members
    for watch in members:
        watch.stop()


def test_no_process_is_at_fault_while_all_go_on(watches: list[Watch]) -> None:
    assert watches[0].reason() is None


def test_process_that_left_with_a_reason_is_named_first(watches: list[Watch]) -> None:
    watches[1].stop()
    watches[2].leave("The disk is full.")
    reason = watches[0].reason()
    assert reason is not None
    assert reason.startswith("Process 2 of the team (on ")
    assert reason.endswith("has stopped: The disk is full.")


def test_process_that_stopped_counting_is_named_next(watches: list[Watch]) -> None:
    watches[2].stop()
    watches[0].step()
    reason = watches[0].reason()
    assert reason is not None
    assert reason.startswith("Process 2")
    assert reason.endswith("no longer answers.")


def test_process_that_is_behind_is_named_last(watches: list[Watch]) -> None:
    for rank in (0, 0, 1, 2, 2):
        watches[rank].step()
    reason = watches[0].reason()
    assert reason is not None
    assert reason.startswith("Process 1")
    assert "did not come" in reason


def test_process_that_was_told_to_leave_is_not_blamed(watches: list[Watch]) -> None:
    watches[1].stop()
    watches[1].leave("")
    assert watches[0].reason() is None


def test_lost_store_is_reported(watches: list[Watch], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("Broken pipe")

    monkeypatch.setattr(Store, "check", fail)
    reason = watches[0].reason()
    assert reason is not None
    assert "connects the others" in reason
