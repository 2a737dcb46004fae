"""Windows cover a text: each token is in at most one, and every token after the start of its window is scored once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shiftadd_cli.data.windows import Windows, cut_windows

sizes = {"tokens": st.integers(0, 300), "length": st.integers(2, 40), "size": st.integers(1, 9)}


def in_order(windows: Windows, size: int = 3) -> list[list[int]]:
    return [window.tolist() for batch in windows.batches(size) for window in batch]


@given(**sizes)
def test_without_a_prefix_all_but_the_first_token_of_each_window_are_scored_once(
    tokens: int, length: int, size: int
) -> None:
    windows = cut_windows(torch.arange(tokens), length)
    contents = in_order(windows, size)
    firsts = [position for position in range(tokens) if position % length == 0]
    scored = [token for window in contents for token in window[windows.unscored :]]
    assert scored == [position for position in range(tokens) if position not in firsts]
    assert len(scored) == windows.scored_tokens
    assert [len(window) for window in contents] == windows.lengths
    assert all(len(window) == length for window in contents[:-1])
    assert [window[0] for window in contents] == firsts[: len(contents)]


@given(**sizes, prefix=st.sampled_from([(1000,), (1000, 1001)]))
def test_with_a_prefix_every_token_is_scored_once(tokens: int, length: int, size: int, prefix: tuple[int, ...]) -> None:
    length += len(prefix)
    windows = cut_windows(torch.arange(tokens), length, prefix)
    contents = in_order(windows, size)
    assert all(tuple(window[: len(prefix)]) == prefix for window in contents)
    assert [token for window in contents for token in window[windows.unscored :]] == list(range(tokens))
    assert windows.scored_tokens == tokens
    assert all(len(window) == length for window in contents[:-1])
    assert all(len(window) <= length for window in contents)


@given(st.lists(st.sampled_from([1, 5, 6, 7]), max_size=200), st.integers(2, 12))
def test_a_window_that_begins_with_the_prefix_gets_no_second_one(text: list[int], length: int) -> None:
    contents = in_order(cut_windows(torch.tensor(text, dtype=torch.int64), length, (1,)))
    remaining = list(text)
    for window in contents:
        assert window[0] == 1
        own_tokens = window if remaining[0] == 1 else window[1:]
        assert own_tokens == remaining[: len(own_tokens)]
        del remaining[: len(own_tokens)]
    assert remaining in ([], [1])


@given(**sizes)
def test_batches_have_the_announced_number_and_size(tokens: int, length: int, size: int) -> None:
    windows = cut_windows(torch.arange(tokens), length)
    batches = list(windows.batches(size))
    assert len(batches) == windows.batch_count(size)
    assert all(len(batch) <= size for batch in batches)


@pytest.mark.parametrize(("length", "prefix"), [(1, ()), (1, (3,)), (2, (3, 4))])
def test_a_window_without_room_for_a_token_is_refused(length: int, prefix: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="no room"):
        cut_windows(torch.arange(9), length, prefix)
