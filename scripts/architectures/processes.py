"""Runs checks in separate processes, forked from one that has imported everything."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import torch

from architectures.check import Outcome, check
from architectures.factory import Architecture

_IMPORTS = (
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.auto.image_processing_auto",
    "shiftadd_cli.cli.quantize",
    "shiftadd_cli.cli.export",
    "shiftadd_cli.pipeline.job",
    "shiftadd_cli.cli.describe",
    "shiftadd_cli.cli.summary",
    "shiftadd_cli.export.dense",
    "shiftadd_cli.runtime.transformers_plugin",
)


def import_everything() -> None:
    """Import the modules that every check needs, so that a forked process starts at once. Computes nothing: a process
    with threads must not be forked."""
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for name in _IMPORTS:
        import_module(name)


@dataclass
class _Running:
    architecture: Architecture
    process: int
    folder: Path
    began: float

    @property
    def answer(self) -> Path:
        return self.folder / "answer.json"


def check_all(architectures: Sequence[Architecture], *, jobs: int, limit_s: float) -> Iterator[Outcome]:
    """Outcomes as they finish, `jobs` checks at a time; a check that takes longer than `limit_s` seconds is killed."""
    waiting, running = list(architectures), list[_Running]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_start(waiting.pop(0)))
            for child in list(running):
                if (outcome := _finished(child, limit_s)) is not None:
                    running.remove(child)
                    shutil.rmtree(child.folder, ignore_errors=True)
                    yield outcome
            time.sleep(0.005)
    finally:
        for child in running:
            _end(child)
            shutil.rmtree(child.folder, ignore_errors=True)


def _start(architecture: Architecture) -> _Running:
    folder = Path(tempfile.mkdtemp(prefix="architecture-"))
    process = os.fork()
    if not process:
        _work(architecture, folder)
    return _Running(architecture, process, folder, time.monotonic())


def _work(architecture: Architecture, folder: Path) -> None:
    """Run the check in the forked process; does not return."""
    code = 1
    try:
        # With its own session, the process and its children can be killed as one group.
        os.setsid()
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        outcome = check(architecture, folder)
        (folder / "answer.json").write_text(json.dumps(outcome.to_dict()))
        code = 0
    finally:
        # Skip the clean-up of the parent process.
        os._exit(code)


def _finished(running: _Running, limit_s: float) -> Outcome | None:
    done, status = os.waitpid(running.process, os.WNOHANG)
    seconds = time.monotonic() - running.began
    name, model_type = running.architecture.name, running.architecture.model_type
    if not done:
        if seconds < limit_s:
            return None
        _end(running)
        return Outcome(name, model_type, "broken", None, f"not done within {limit_s:.0f} seconds", seconds)
    if not running.answer.is_file():
        code = os.waitstatus_to_exitcode(status)
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return Outcome(name, model_type, "broken", None, f"the process ended without an answer ({how})", seconds)
    return replace(Outcome(**json.loads(running.answer.read_text())), seconds=round(seconds, 2))


def _end(running: _Running) -> None:
    for end in (lambda: os.killpg(running.process, signal.SIGKILL), lambda: os.waitpid(running.process, 0)):
        try:
            end()
        except (ProcessLookupError, ChildProcessError):
            # The process has already ended.
            continue
