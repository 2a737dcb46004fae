"""Properties of the kernels as Triton compiles them for NVIDIA GPUs, which this machine need not have."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [
    pytest.mark.skipif(platform.system() != "Linux", reason="triton's compiler is for Linux"),
]

# Bytes of shared memory that a program can use on every GPU since compute capability 8.0.
SHARED_MEMORY = 99 << 10


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """Properties of the compiled kernels by variant; see `compile_kernels`."""
    program = Path(__file__).with_name("compile_kernels.py")
    cache = str(tmp_path_factory.mktemp("triton"))
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache}
    result = subprocess.run([sys.executable, program], capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


def test_kernels_compile_into_registers_and_fit_the_shared_memory(compiled: dict[str, dict[str, int]]) -> None:
    for capability in ("80", "90"):
        kinds = {name.split("-")[0] for name in compiled if f"-{capability}" in name}
        assert kinds == {"gemv", "gemm", "spread", "sum"}
    # Two registers may be spilled: the compiler stops at a round number of them.
    assert {name: properties["stack"] for name, properties in compiled.items() if properties["stack"] > 8} == {}
    assert max(properties["shared"] for properties in compiled.values()) <= SHARED_MEMORY


def test_activations_of_the_gemv_do_not_go_through_shared_memory(compiled: dict[str, dict[str, int]]) -> None:
    """That would take two barriers for each of eight lanes. Sums, scales and offsets of a tile take a few."""
    barriers = {name: properties["barriers"] for name, properties in compiled.items() if name.startswith("gemv")}
    assert max(barriers.values()) <= 8, barriers


def test_gemm_runs_on_tensor_cores_in_half_precision_but_not_in_float32(
    compiled: dict[str, dict[str, int]],
) -> None:
    for name, properties in compiled.items():
        if name.startswith("gemm"):
            assert bool(properties["tensor_cores"]) is not name.endswith("-float32"), name
