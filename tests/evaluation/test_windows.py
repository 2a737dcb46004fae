"""The windows cover a text: each token is in at most one, and all but the first of each window are scored once."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from shiftadd_cli.evaluation.windows import batch_count, batches, scored_tokens, window_lengths

sizes = {"tokens": st.integers(0, 300), "context": st.integers(2, 40), "batch_size": st.integers(1, 9)}


@given(**sizes)
def test_every_token_but_the_first_of_each_window_is_scored_once(tokens, context, batch_size):
    found = [window.tolist() for batch in batches(torch.arange(tokens), context, batch_size) for window in batch]
    scored = [token for window in found for token in window[1:]]
    firsts = [place for place in range(tokens) if place % context == 0]
    assert scored == [place for place in range(tokens) if place not in firsts]
    assert len(scored) == scored_tokens(tokens, context)
    assert [len(window) for window in found] == window_lengths(tokens, context)
    assert all(len(window) == context for window in found[:-1])
    assert [window[0] for window in found] == firsts[: len(found)]


@given(**sizes)
def test_batches_are_as_many_and_as_large_as_announced(tokens, context, batch_size):
    found = list(batches(torch.arange(tokens), context, batch_size))
    assert len(found) == batch_count(tokens, context, batch_size)
    assert all(len(batch) <= batch_size for batch in found)
