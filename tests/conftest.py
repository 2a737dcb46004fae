"""Settings of the whole test session."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

# Set before anything imports torch or huggingface_hub, and inherited by the commands that tests start. No test may use
# the network, and on two shared cores one thread is the fastest for tiny models.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton decides at import whether to interpret kernels on the CPU; 0 runs their tests on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")
# The tests' cache stays apart from the user's own.
os.environ["SHIFTADD_CACHE"] = tempfile.mkdtemp(prefix="shiftadd-cache-")
atexit.register(shutil.rmtree, os.environ["SHIFTADD_CACHE"], ignore_errors=True)

REPOSITORY = Path(__file__).resolve().parent.parent
# Commands that tests start run this checkout, whatever the environment has installed.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout under test."""
    return REPOSITORY


@pytest.fixture(autouse=True)
def _own_peak_memory() -> None:
    """Starts the peak memory of the process anew: plans take it into account, and an earlier test may have set it."""
    counter = Path("/proc/self/clear_refs")
    if counter.exists():
        counter.write_text("5")
