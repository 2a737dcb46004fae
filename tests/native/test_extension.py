from __future__ import annotations

import platform
import shutil
from pathlib import Path

import pytest
import torch

from shiftadd_cli.native import extension
from shiftadd_cli.native.extension import cpu_extension, instruction_sets


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_kernels_are_built_where_there_is_a_compiler() -> None:
    assert cpu_extension() is not None


@pytest.mark.skipif(cpu_extension() is None, reason="installed without compiled kernels")
def test_the_plain_kernels_are_the_last_resort() -> None:
    assert instruction_sets()[-1] == "portable"
    if platform.machine() == "x86_64":
        assert set(instruction_sets()) <= {"avx512_bf16", "avx512", "avx2", "portable"}


@pytest.mark.skipif(cpu_extension() is None, reason="installed without compiled kernels")
@pytest.mark.skipif(not list(Path(torch.__file__).parent.glob("lib/libgomp*")), reason="torch has another OpenMP")
def test_the_team_belongs_to_torchs_runtime() -> None:
    """The address is inside the library that this process has mapped for torch."""
    address = extension._torchs_team()
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [fields[0] for fields in mapped if fields[-1].startswith(str(Path(torch.__file__).parent / "lib/libgomp"))]
    ranges = [tuple(int(end, 16) for end in span.split("-")) for span in spans]
    assert address is not None
    assert any(start <= address < end for start, end in ranges)
