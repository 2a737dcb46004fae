from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from formats import layout_on, matrix_format

from shiftadd_cli.bcq.grid import ScaleGrid
from shiftadd_cli.bcq.weight import PackedLayout
from shiftadd_cli.errors import RuntimeChoiceError
from shiftadd_cli.kernels import select as choice
from shiftadd_cli.kernels.select import Kernel, Precision, chosen_kernel, chosen_precision, suited_kernel


def test_empty_settings_mean_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHIFTADD_KERNEL", raising=False)
    monkeypatch.setenv("SHIFTADD_PRECISION", " ")
    assert chosen_kernel() is Kernel.AUTO
    assert chosen_precision() is Precision.AUTO


def test_values_are_case_insensitive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHIFTADD_KERNEL", "Reference")
    monkeypatch.setenv("SHIFTADD_PRECISION", "FAST")
    assert chosen_kernel() is Kernel.REFERENCE
    assert chosen_precision() is Precision.FAST


@pytest.mark.parametrize(("variable", "read"), [("SHIFTADD_KERNEL", chosen_kernel),
                                               ("SHIFTADD_PRECISION", chosen_precision)])  # fmt: skip
def test_unknown_values_are_refused_with_the_choices(
    variable: str, read: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "quick")
    with pytest.raises(RuntimeChoiceError, match=f"{variable} is 'quick'; give one of auto, "):
        read()


def test_missing_kernels_cannot_be_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHIFTADD_KERNEL", "cpu")
    monkeypatch.setattr(choice, "cpu_extension", lambda: None)
    with pytest.raises(RuntimeChoiceError, match="install a C\\+\\+ compiler"):
        chosen_kernel()


LAYOUT = layout_on(ScaleGrid.resolve(64, 128, 1, 64), 3, "apot2", True, False)
NARROW = layout_on(ScaleGrid.resolve(64, 128, "all", 1), 3, "apot2", False, False)
SHIFTS = PackedLayout(matrix_format(4, primitive="shift2"), 64, 128)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("setting", "layout", "device", "compiled", "gpu", "expected"),
    [
        ("auto", LAYOUT, CPU, True, False, Kernel.CPU),
        ("auto", LAYOUT, CPU, False, False, Kernel.REFERENCE),
        ("auto", LAYOUT, CUDA, True, True, Kernel.TRITON),
        ("auto", LAYOUT, CUDA, True, False, Kernel.REFERENCE),
        ("auto", LAYOUT, torch.device("meta"), True, True, Kernel.REFERENCE),
        ("auto", NARROW, CPU, True, True, Kernel.REFERENCE),
        ("auto", NARROW, CUDA, True, True, Kernel.REFERENCE),
        ("auto", SHIFTS, CPU, True, False, Kernel.REFERENCE),
        ("auto", SHIFTS, CUDA, True, True, Kernel.REFERENCE),
        ("cpu", SHIFTS, CPU, True, False, Kernel.REFERENCE),
        ("triton", SHIFTS, CUDA, True, True, Kernel.REFERENCE),
        ("reference", LAYOUT, CPU, True, True, Kernel.REFERENCE),
        ("reference", LAYOUT, CUDA, True, True, Kernel.REFERENCE),
        ("cpu", LAYOUT, CPU, True, False, Kernel.CPU),
        ("cpu", LAYOUT, CUDA, True, True, Kernel.REFERENCE),
        ("triton", LAYOUT, CUDA, True, True, Kernel.TRITON),
    ],
)
def test_each_device_gets_a_suitable_kernel(
    setting: str,
    layout: PackedLayout,
    device: torch.device,
    compiled: bool,
    gpu: bool,
    expected: Kernel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SHIFTADD_KERNEL", setting)
    monkeypatch.setattr(choice, "cpu_extension", lambda: compiled or None)
    monkeypatch.setattr(choice, "triton_runs", lambda: gpu)
    assert suited_kernel(layout, device) is expected


def test_triton_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHIFTADD_KERNEL", "triton")
    monkeypatch.setattr(choice, "triton_runs", lambda: False)
    with pytest.raises(RuntimeChoiceError, match="needs an NVIDIA GPU"):
        chosen_kernel()
