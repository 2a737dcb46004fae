"""Freed memory goes back to the system."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
from pathlib import Path

import pytest
import torch

from shiftadd_cli.source import memory


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps and returns memory this way")
def test_gaps_between_living_blocks_are_returned() -> None:
    # Blocks of 64 KiB lie on the heap. Every second one stays alive, so the heap cannot shrink by itself.
    blocks = [torch.ones(16384) for _ in range(2000)]
    del blocks[::2]
    gc.collect()
    before = _resident_bytes()
    memory.trim()
    assert before - _resident_bytes() > 0.8 * 1000 * 65536
    assert all(bool(block.all()) for block in blocks)


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    memory.trim()
