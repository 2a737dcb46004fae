"""The description of the machine is read from the system."""

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


def test_the_highest_cache_level_counts_not_the_last_listed(tmp_path: Path) -> None:
    for index, (level, size) in enumerate([(1, "48K"), (3, "32M"), (2, "2048K"), (1, "32K")]):
        write_cache(tmp_path, index, level, size)
    assert last_level_cache(tmp_path) == 32 << 20


def test_the_cache_is_unknown_if_the_system_does_not_report_it(tmp_path: Path) -> None:
    assert last_level_cache(tmp_path) is None
    write_cache(tmp_path, 0, 1, "unknown")
    assert last_level_cache(tmp_path) is None


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not report it")
def test_resident_and_free_memory_are_read() -> None:
    before = resident_memory()
    assert before is not None
    # Mapped from the system, since Python objects may use memory that the process already has.
    with mmap.mmap(-1, 50 << 20) as buffer:
        for page in range(0, len(buffer), mmap.PAGESIZE):
            buffer[page] = 1
        after = resident_memory()
        assert after is not None
        assert 40 << 20 < after - before < 80 << 20
        assert free_memory() > len(buffer)


def test_the_machine_is_described_in_json() -> None:
    description = Machine.this(3).to_dict()
    assert description["threads"] == 3
    assert description["cores"] >= 1
    assert {"torch", "transformers", "shiftadd-cli", "python"} == description["versions"].keys()
