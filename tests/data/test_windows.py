"""The windows cover a text: each token is in at most one, and all behind the start of their window are scored once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shiftadd_cli.data.windows import cut_windows

sizes = {"tokens": st.integers(0, 300), "length": st.integers(2, 40), "size": st.integers(1, 9)}


def in_order(windows, size=3):
    return [window.tolist() for batch in windows.batches(size) for window in batch]


@given(**sizes)
def test_without_a_prefix_every_token_but_the_first_of_each_window_is_scored_once(tokens, length, size):
    cut = cut_windows(torch.arange(tokens), length)
    found = in_order(cut, size)
    firsts = [place for place in range(tokens) if place % length == 0]
    scored = [token for window in found for token in window[cut.unscored :]]
    assert scored == [place for place in range(tokens) if place not in firsts]
    assert len(scored) == cut.scored_tokens
    assert [len(window) for window in found] == cut.lengths
    assert all(len(window) == length for window in found[:-1])
    assert [window[0] for window in found] == firsts[: len(found)]


@given(**sizes, prefix=st.sampled_from([(1000,), (1000, 1001)]))
def test_with_a_prefix_every_token_of_the_text_is_scored_once(tokens, length, size, prefix):
    length += len(prefix)
    cut = cut_windows(torch.arange(tokens), length, prefix)
    found = in_order(cut, size)
    assert all(tuple(window[: len(prefix)]) == prefix for window in found)
    assert [token for window in found for token in window[cut.unscored :]] == list(range(tokens))
    assert cut.scored_tokens == tokens
    assert all(len(window) == length for window in found[:-1])
    assert all(len(window) <= length for window in found)


@given(st.lists(st.sampled_from([1, 5, 6, 7]), max_size=200), st.integers(2, 12))
def test_a_window_that_begins_with_the_prefix_gets_no_second_one(text, length):
    found = in_order(cut_windows(torch.tensor(text, dtype=torch.int64), length, (1,)))
    left = list(text)
    for window in found:
        assert window[0] == 1
        own = window if left[0] == 1 else window[1:]
        assert own == left[: len(own)]
        del left[: len(own)]
    assert left in ([], [1])


@given(**sizes)
def test_batches_are_as_many_and_as_large_as_announced(tokens, length, size):
    cut = cut_windows(torch.arange(tokens), length)
    found = list(cut.batches(size))
    assert len(found) == cut.batch_count(size)
    assert all(len(batch) <= size for batch in found)


@pytest.mark.parametrize(("length", "prefix"), [(1, ()), (1, (3,)), (2, (3, 4))])
def test_a_window_without_room_for_a_token_is_refused(length, prefix):
    with pytest.raises(ValueError, match="no room"):
        cut_windows(torch.arange(9), length, prefix)
