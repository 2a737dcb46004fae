"""The machine is described by what the system says of it."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest

from shiftadd_cli.benchmark.machine import Machine, free_memory, last_level_cache, resident_memory


def write_cache(root: Path, index: int, level: int, size: str) -> None:
    folder = root / f"index{index}"
    folder.mkdir()
    (folder / "level").write_text(f"{level}\n")
    (folder / "size").write_text(f"{size}\n")


def test_the_last_level_counts_and_not_the_last_listed(tmp_path):
    for index, (level, size) in enumerate([(1, "48K"), (3, "32M"), (2, "2048K"), (1, "32K")]):
        write_cache(tmp_path, index, level, size)
    assert last_level_cache(tmp_path) == 32 << 20


def test_a_system_that_does_not_say_has_no_known_cache(tmp_path):
    assert last_level_cache(tmp_path) is None
    write_cache(tmp_path, 0, 1, "unknown")
    assert last_level_cache(tmp_path) is None


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system does not say")
def test_memory_is_told():
    before = resident_memory()
    # Fresh from the system: what Python takes may come from memory that the process has already.
    with mmap.mmap(-1, 50 << 20) as kept:
        for page in range(0, len(kept), mmap.PAGESIZE):
            kept[page] = 1
        assert 40 << 20 < resident_memory() - before < 80 << 20
        assert free_memory() > len(kept)


def test_the_machine_is_json():
    told = Machine.this(3).to_dict()
    assert told["threads"] == 3
    assert told["cores"] >= 1
    assert {"torch", "transformers", "shiftadd-cli", "python"} == told["versions"].keys()
