"""Where and with how many threads to compute."""

from __future__ import annotations

import pytest
import torch

from shiftadd_cli.device import use_threads


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def test_threads_are_set_only_where_a_number_is_given(threads):
    assert use_threads(None) == threads
    assert use_threads(2) == torch.get_num_threads() == 2
    assert use_threads(None) == 2
