"""Who is named when a process of a team gives up."""

from __future__ import annotations

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
def watches(monkeypatch: pytest.MonkeyPatch) -> list[Watch]:
    """Of three processes that count every hundredth of a second."""
    monkeypatch.setattr(watch_module, "_BEAT_SECONDS", 0.01)
    monkeypatch.setattr(watch_module, "_LOOK_SECONDS", 0.5)
    store: Any = Store()
    found = [Watch(store, rank, 3) for rank in range(3)]
    for each in found:
        each.start()
    yield found
    for each in found:
        each.stop()


def test_nobody_is_at_fault_where_all_go_on(watches: list[Watch]) -> None:
    assert watches[0].reason() is None


def test_who_has_said_why_it_leaves_comes_first(watches: list[Watch]) -> None:
    watches[1].stop()
    watches[2].leave("The disk is full.")
    reason = watches[0].reason()
    assert reason is not None
    assert reason.startswith("Process 2 of the team (on ")
    assert reason.endswith("has stopped: The disk is full.")


def test_who_counts_no_longer_comes_next(watches: list[Watch]) -> None:
    watches[2].stop()
    watches[0].step()
    reason = watches[0].reason()
    assert reason is not None
    assert reason.startswith("Process 2")
    assert reason.endswith("no longer answers.")


def test_who_is_behind_comes_last(watches: list[Watch]) -> None:
    for rank in (0, 0, 1, 2, 2):
        watches[rank].step()
    reason = watches[0].reason()
    assert reason is not None
    assert reason.startswith("Process 1")
    assert "did not come" in reason


def test_who_was_told_to_leave_is_not_to_blame(watches: list[Watch]) -> None:
    watches[1].stop()
    watches[1].leave("")
    assert watches[0].reason() is None


def test_a_store_that_is_gone_is_said(watches: list[Watch], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("Broken pipe")

    monkeypatch.setattr(Store, "check", fail)
    reason = watches[0].reason()
    assert reason is not None
    assert "connects the others" in reason
