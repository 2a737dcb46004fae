"""Kills runs of `shiftadd quantize` with SIGKILL at random moments, resumes them, and compares with an undisturbed run.

Prints for every kill its time, the number of finished blocks, its cost in seconds (both sessions together minus an
undisturbed run just before: the lost work, plus opening and tracing the model again; the start of Python is not
counted), and whether the artifact is byte-identical except for times and the name of its folder. The exit code is 1 if
one is not.

    python scripts/benchmark_faults.py demo --kills 20 -- --samples 16 --seq-len 128
"""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from shiftadd_cli.cli.summary import table

_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["shiftadd_cli.cli.quantize", "shiftadd_cli.pipeline.job"])


def quantize(arguments: list[str]) -> None:
    """Run the command in this process and drop its output."""
    from shiftadd_cli.cli import main

    sys.stdout = sys.stderr = open("/dev/null", "w")  # noqa: SIM115 - until the process ends
    main(["quantize", *arguments])


def run(arguments: list[str], kill_after: float | None = None) -> tuple[float, bool]:
    """Seconds that the command ran, and whether it was killed."""
    process = _PROCESSES.Process(target=quantize, args=(arguments,))
    start = time.monotonic()
    process.start()
    process.join(kill_after)
    killed = process.is_alive()
    if killed:
        process.kill()
        process.join()
    elif process.exitcode:
        raise click.ClickException(f"shiftadd quantize {' '.join(arguments)} ended with {process.exitcode}")
    return time.monotonic() - start, killed


def contents(folder: Path) -> dict[str, Any]:
    """Files by name. report.json is without the parts that differ between runs; its pages only have to exist."""
    pages = ("report.html", "README.md")
    files: dict[str, Any] = {path.name: path.name in pages or path.read_bytes() for path in folder.iterdir()}
    report = json.loads(files["report.json"])
    for part in ("seconds", "machine", "command"):
        del report[part]
    return files | {"report.json": report}


@click.command()
@click.argument("model")
@click.option("--kills", default=20, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.argument("options", nargs=-1)
def main(model: str, kills: int, seed: int, options: tuple[str, ...]) -> None:
    """Kill and resume runs; OPTIONS are those of `shiftadd quantize`."""
    draw = random.Random(seed)
    rows: list[tuple[str, ...]] = []
    losses, same = [], 0
    with tempfile.TemporaryDirectory() as scratch:
        reference, out = Path(scratch) / "whole", Path(scratch) / "out"
        partial = Path(scratch) / ".out.partial"
        run([model, "-o", str(reference), *options])  # reads every file into the system's cache
        expected = contents(reference)
        while len(rows) < kills:
            # Measured again each time, because the load of the machine changes.
            undisturbed, _ = run([model, "-o", str(reference), "--overwrite", *options])
            first, killed = run([model, "-o", str(out), *options], kill_after=draw.uniform(0, undisturbed))
            if not killed or out.exists():
                shutil.rmtree(out)
                continue
            finished = len(list((partial / "journal").glob("block-*.json")))
            kept_bytes = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
            second, _ = run([model, "-o", str(out), *options])
            alike = contents(out) == expected and not partial.exists()
            same += alike
            losses.append(first + second - undisturbed)
            row = (f"{first:.1f}", f"{undisturbed:.1f}", str(finished), f"{kept_bytes / 1e6:.2f}", f"{losses[-1]:.1f}")
            rows.append((str(len(rows) + 1), *row, str(alike)))
            shutil.rmtree(out)
    header = ("kill", "after, s", "undisturbed, s", "blocks finished", "kept, MB", "lost, s", "same bytes")
    click.echo(table(header, rows))
    click.echo(f"\n{same} of {kills} are the same; median loss {statistics.median(losses):.1f} s")
    sys.exit(same != kills)


if __name__ == "__main__":
    main()
