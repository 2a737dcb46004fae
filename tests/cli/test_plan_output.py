"""Paths that plan.json may be written to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import pytest
from bit_plans import plan_for
from formats import recipe_of
from tiny_models import save_tiny

from shiftadd_cli.allocation.plan_file import load_plan
from shiftadd_cli.cli.plan_output import check_plan_output, write_plan
from shiftadd_cli.errors import OutputError


def test_folders_existing_files_and_missing_parents_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.json"
    check_plan_output(path, overwrite=False)
    path.write_text("{}")
    with pytest.raises(OutputError, match="--overwrite"):
        check_plan_output(path, overwrite=False)
    check_plan_output(path, overwrite=True)
    with pytest.raises(OutputError, match="is a folder"):
        check_plan_output(tmp_path, overwrite=True)
    with pytest.raises(OutputError, match="does not exist"):
        check_plan_output(tmp_path / "no" / "plan.json", overwrite=False)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match="permission"):
        check_plan_output(tmp_path / "other.json", overwrite=False)


def test_plan_is_written_completely_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_for(save_tiny("llama", tmp_path / "model"), recipe_of(group_size=16))
    out = tmp_path / "plans" / "plan.json"
    out.parent.mkdir()
    write_plan(plan, out)
    assert load_plan(out) == plan

    def full(*_: object, **__: object) -> NoReturn:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(out), "write_bytes", full)
    with pytest.raises(OutputError, match="space"):
        write_plan(plan, out)
    assert load_plan(out) == plan
    assert list(out.parent.iterdir()) == [out]
