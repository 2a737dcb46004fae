"""`scripts/benchmark_solver.py` on small matrices: the contents of its table, not the times."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from benchmark_solver import main
from click.testing import CliRunner

from shiftadd_cli.native.extension import instruction_sets


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Restore the number of threads afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_implementation_has_a_column_and_every_task_a_row() -> None:
    result = CliRunner().invoke(main, ["--columns", "24,130", "--tokens", "40", "--rounds", "2"])
    assert result.exit_code == 0, result.output
    header, *rows = result.output.splitlines()
    assert header.split("  ")[0] == "work"
    assert all(f"{way}, ms" in header for way in ("torch", *instruction_sets()))
    assert len(rows) == 6
    assert all(row.count(" x)") == 1 + len(instruction_sets()) for row in rows)
    assert all("(1.0 x)" in row for row in rows)


def test_invalid_number_of_columns_is_refused() -> None:
    assert CliRunner().invoke(main, ["--columns", "0"]).exit_code == 2
