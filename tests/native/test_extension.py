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
        assert set(instruction_sets()) <= {"amx", "avx512_bf16", "avx512", "avx2", "portable"}


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


@pytest.mark.skipif(cpu_extension() is None, reason="installed without compiled kernels")
@pytest.mark.parametrize(
    ("name", "shape"),
    [("x", (6,)), ("other", (3, 2)), ("roots", (2, 1)), ("hessian", (9,)), ("cross", (1, 9)), ("cross", (2, 2))],
)
def test_moments_refuse_tensors_of_another_shape(name: str, shape: tuple[int, ...]) -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "x": (2, 3),
        "other": (2, 3),
        "roots": (2,),
        "hessian": (3, 3),
        "cross": (3, 3),
    }
    fields = {field: torch.zeros(size) for field, size in shapes.items()}
    cpu_extension().add_moments(**fields, kernels="portable", threads=1)
    with pytest.raises(ValueError, match="do not fit"):
        cpu_extension().add_moments(**fields | {name: torch.zeros(shape)}, kernels="portable", threads=1)


@pytest.mark.skipif(cpu_extension() is None, reason="installed without compiled kernels")
@pytest.mark.parametrize(
    ("name", "shape"),
    [("coupling", (2, 3)), ("midpoints", (1, 3, 2)), ("groups", (2, 1)), ("values", (3, 2)), ("steps", (6,))],
)
def test_columns_refuse_tensors_of_another_shape(name: str, shape: tuple[int, ...]) -> None:
    fields = {
        "goals": torch.zeros(2, 3), "coupling": torch.eye(2), "levels": torch.zeros(2, 1, 3),
        "midpoints": torch.zeros(1, 1, 3), "groups": torch.zeros(2, dtype=torch.int64), "values": torch.zeros(2, 3),
        "ranks": torch.zeros(2, 3, dtype=torch.uint8), "steps": torch.zeros(2, 3),
    }  # fmt: skip
    cpu_extension().settle(descend=False, **fields, kernels="portable", threads=1)
    changed = fields | {name: torch.zeros(shape, dtype=fields[name].dtype)}
    with pytest.raises(ValueError, match="do not fit"):
        cpu_extension().settle(descend=False, **changed, kernels="portable", threads=1)


@pytest.mark.skipif(cpu_extension() is None, reason="installed without compiled kernels")
def test_columns_refuse_a_group_without_levels() -> None:
    fields = {
        "goals": torch.zeros(1, 2), "coupling": torch.eye(1), "levels": torch.zeros(2, 1, 2),
        "midpoints": torch.zeros(1, 1, 2), "groups": torch.ones(1, dtype=torch.int64), "values": torch.zeros(1, 2),
        "ranks": torch.zeros(1, 2, dtype=torch.uint8), "steps": torch.zeros(1, 2),
    }  # fmt: skip
    with pytest.raises(ValueError, match="no such group"):
        cpu_extension().settle(descend=False, **fields, kernels="portable", threads=1)
