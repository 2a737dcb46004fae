from __future__ import annotations

import platform
import shutil

import pytest

from shiftadd_cli.runtime.kernels.extension import cpu_extension, instruction_sets


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_it_is_built_where_a_compiler_is() -> None:
    assert cpu_extension() is not None


@pytest.mark.skipif(cpu_extension() is None, reason="installed without compiled kernels")
def test_the_plain_kernels_are_the_last_resort() -> None:
    assert instruction_sets()[-1] == "portable"
    if platform.machine() == "x86_64":
        assert set(instruction_sets()) <= {"avx512_bf16", "avx512", "avx2", "portable"}
