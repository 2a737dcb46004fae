"""The folder of an unfinished run: it serves one run at a time, and is kept while it is worth resuming."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shiftadd_cli.artifact.workspace import Workspace
from shiftadd_cli.errors import NumericalError, OutputError, ResumeError

HOLD = """
import sys, time, pathlib
from shiftadd_cli.artifact.workspace import Workspace
with Workspace(pathlib.Path(sys.argv[1])) as workspace:
    for name in ("run", "start"):
        workspace.journal.put(name, {})
    print("held", flush=True)
    time.sleep(600)
"""


def begin(out: Path, *records: str) -> Path:
    """An unfinished run with these records."""
    with Workspace(out) as workspace:
        for name in records:
            workspace.journal.put(name, {"name": name})
    return workspace.folder


def test_a_folder_is_kept_after_the_start_record(tmp_path: Path) -> None:
    assert not begin(tmp_path / "deep" / "out", "run").exists()
    assert not list(tmp_path.iterdir())
    folder = begin(tmp_path / "out", "run", "start")
    assert folder == tmp_path / ".out.partial"
    with Workspace(tmp_path / "out") as workspace:
        assert workspace.journal.get("start") == {"name": "start"}
    with Workspace(tmp_path / "out", resume=False) as workspace:
        assert len(workspace.journal) == 0
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_a_killed_run_without_a_start_record(tmp_path: Path) -> None:
    """Its files might have another layout than those of the next run."""
    begin(tmp_path / "out", "run", "start")
    folder = tmp_path / ".out.partial"
    (folder / "journal" / "start.json").unlink()
    (folder / "artifact" / "model-00001-of-00007.safetensors").write_text("")
    with Workspace(tmp_path / "out") as workspace:
        assert len(workspace.journal) == 0
        assert list(workspace.artifact.iterdir()) == []


def test_a_run_that_would_fail_again_is_removed(tmp_path: Path) -> None:
    begin(tmp_path / "out", "run", "start")
    with pytest.raises(NumericalError), Workspace(tmp_path / "out"):
        raise NumericalError("not finite")
    assert not list(tmp_path.iterdir())


def test_only_one_run_writes_until_it_ends_or_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match="Another run is writing"), Workspace(tmp_path / "out"):
            pass
        assert (tmp_path / ".out.partial" / "journal" / "start.json").is_file()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    with Workspace(tmp_path / "out") as workspace:
        assert workspace.journal.get("start") == {}


def test_remains_of_a_finished_run_are_not_resumed(tmp_path: Path) -> None:
    folder = begin(tmp_path / "out", "run", "start")
    shutil.rmtree(folder / "artifact")
    with Workspace(tmp_path / "out") as workspace:
        assert len(workspace.journal) == 0


def test_the_old_artifact_comes_back_when_the_swap_was_cut_short(tmp_path: Path) -> None:
    folder = begin(tmp_path / "out", "run", "start")
    (folder / "old").mkdir()
    (folder / "old" / "config.json").write_text("old")
    with Workspace(tmp_path / "out"):
        assert (tmp_path / "out" / "config.json").read_text() == "old"


def test_publishing_overwrites_only_on_request(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    with pytest.raises(OutputError, match="appeared meanwhile"), Workspace(out) as workspace:
        workspace.publish(overwrite=False)
    assert (out / "config.json").read_text() == "old"
    with Workspace(out) as workspace:
        (workspace.artifact / "config.json").write_text("new")
        workspace.publish(overwrite=True)
    assert (out / "config.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"record": {}, "sha256": "0"}', b"\xff"])
def test_a_damaged_record_is_refused_and_stays(tmp_path: Path, content: bytes) -> None:
    folder = begin(tmp_path / "out", "run", "start")
    (folder / "journal" / "start.json").write_bytes(content)
    with pytest.raises(ResumeError, match=r"start\.json is damaged .*`resume=False`"), Workspace(tmp_path / "out"):
        pass
    assert (folder / "journal" / "start.json").read_bytes() == content


def test_an_unfinished_record_does_not_count(tmp_path: Path) -> None:
    folder = begin(tmp_path / "out", "run", "start")
    (folder / "journal" / "block-00000.json.new").write_text('{"rec')
    with Workspace(tmp_path / "out") as workspace:
        assert len(workspace.journal) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="the root user may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="No permission"), Workspace(tmp_path / "locked" / "out"):
        pass
