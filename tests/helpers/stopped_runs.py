"""Runs that are stopped midway, and the comparable contents of artifacts."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import shiftadd_cli
from shiftadd_cli import context
from shiftadd_cli.errors import Interrupted

# Parts of report.json that differ between runs, and the pages that are made of them and of the folder's name.
_OF_THE_RUN = ("seconds", "machine", "command")
_PAGES = ("report.html", "README.md")

_FILE_OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}
# Imports once, and forks from there.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(
    [
        "stopped_runs",
        "shiftadd_cli.cli.quantize",
        "shiftadd_cli.pipeline.job",
        "transformers.models.llama.modeling_llama",
    ]
)


def stop_before(monkeypatch: pytest.MonkeyPatch, step: int, failure: BaseException | None = None) -> None:
    """Make every run fail before its remaining block number `step`, or before the end if it has no more blocks."""

    def bar(names: Sequence[str], text: str) -> Iterator[str]:
        for index, name in enumerate(names):
            if index == step and text.startswith("Quantizing"):
                raise failure or KeyboardInterrupt
            yield name
        if step >= len(names) and text.startswith("Quantizing"):
            raise failure or KeyboardInterrupt

    monkeypatch.setattr(context, "block_bar", bar)


def stopped(monkeypatch: pytest.MonkeyPatch, step: int, *arguments: Any, **fields: Any) -> None:
    """Start `shiftadd_cli.quantize` and stop it there."""
    with monkeypatch.context() as patch:
        stop_before(patch, step)
        with pytest.raises(Interrupted):
            shiftadd_cli.quantize(*arguments, **fields)


def counting_text(path: Path) -> Path:
    """Write a short calibration text, which takes a hundredth of the time of the builtin one to tokenize."""
    path.write_text("".join(f"{number} is a number. " for number in range(500)))
    return path


def contents(folder: Path) -> dict[str, Any]:
    """Files of an artifact by name, as bytes: only the ends of pages; report.json without times, memory and command."""
    files: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    report = json.loads(files.pop("report.json"))
    files |= {name: files[name][-20:] for name in _PAGES}
    return files | {"report.json": {name: value for name, value in report.items() if name not in _OF_THE_RUN}}


def run_disturbed(fault: str, moment: int, arguments: Sequence[str], log: Path) -> None:
    """Run the command `shiftadd` in this process, with a fault at file operation number `moment` in a partial folder.

    Needs a process of its own. fault: the name of a signal, or of an errno with which the next opening of a file for
    writing fails, or empty. Python announces every open, rename and removal, so a moment is the same in every run.
    `log` receives standard output and error; its last line is the number of operations, and which of them stored the
    first block.
    """
    import errno
    import os
    import signal
    import sys

    from shiftadd_cli.cli import main

    # A process that a shell starts in the background would ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    seen, stored_at, failed = 0, 0, False

    def watch(event: str, details: tuple[Any, ...]) -> None:
        nonlocal seen, stored_at, failed
        if event not in _FILE_OPERATIONS or ".partial" not in str(details[0]):
            return
        if event == "open" and os.path.isdir(details[0]):
            # An unnamed file; `tempfile` tries another way if this one fails.
            return
        seen += 1
        if event == "os.rename" and "block-00000" in str(details[0]):
            stored_at = seen
        if fault.startswith("SIG"):
            if seen == moment:
                os.kill(os.getpid(), getattr(signal, fault))
        elif fault and seen >= moment and not failed and event == "open" and details[2] & (os.O_WRONLY | os.O_RDWR):
            failed = True
            number = getattr(errno, fault)
            raise OSError(number, os.strerror(number), str(details[0]))

    sys.addaudithook(watch)
    try:
        main(arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(stream, f"\n{seen} {stored_at}".encode())


def disturbed(fault: str, moment: int, arguments: Sequence[str], log: Path) -> tuple[int, str]:
    """`run_disturbed` in a separate process: its exit code (negative for a signal) and its output."""
    process = _PROCESSES.Process(target=run_disturbed, args=(fault, moment, [*map(str, arguments)], log))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode, log.read_text()
