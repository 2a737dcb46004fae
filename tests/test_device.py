"""The number of threads, and the dtypes a device computes in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from shiftadd_cli.device import computes_in, use_threads


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def test_threads_are_set_only_if_a_number_is_given(threads: int) -> None:
    assert use_threads(None) == threads
    assert use_threads(2) == torch.get_num_threads() == 2
    assert use_threads(None) == 2


def test_cpu_without_16_bit_instructions_computes_in_no_16_bit_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert not computes_in(cpu, torch.bfloat16)
    assert not computes_in(cpu, torch.float16)
    assert computes_in(cpu, torch.float32)
    assert computes_in(gpu, torch.float16)
