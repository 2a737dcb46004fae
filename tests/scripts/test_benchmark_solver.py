"""`scripts/benchmark_solver.py` on small matrices: what it times, not how fast it is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from benchmark_solver import main
from click.testing import CliRunner

from shiftadd_cli.native.extension import instruction_sets


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """As they were."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_way_has_a_column_and_every_work_a_row() -> None:
    done = CliRunner().invoke(main, ["--columns", "24,130", "--tokens", "40", "--rounds", "2"])
    assert done.exit_code == 0, done.output
    header, *rows = done.output.splitlines()
    assert header.split("  ")[0] == "work"
    assert all(f"{way}, ms" in header for way in ("torch", *instruction_sets()))
    assert len(rows) == 6
    assert all(row.count(" x)") == 1 + len(instruction_sets()) for row in rows)
    assert all("(1.0 x)" in row for row in rows)


def test_what_is_no_number_is_refused() -> None:
    assert CliRunner().invoke(main, ["--columns", "0"]).exit_code == 2
