"""What a process took is its own."""

from __future__ import annotations

import subprocess
import sys


def test_peak_memory_is_not_that_of_the_process_that_started_this_one():
    child = "from shiftadd_cli.pipeline.memory import resident_bytes; print(resident_bytes())"
    parent = (
        "import subprocess, sys; kept = bytearray(b'x') * (1 << 30); "
        "subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"
    )
    done = subprocess.run([sys.executable, "-c", parent, child], capture_output=True, text=True, check=True)
    assert 10e6 < int(done.stdout) < 1e9
