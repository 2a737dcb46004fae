from __future__ import annotations

import pytest

from shiftadd_cli.errors import RuntimeChoiceError
from shiftadd_cli.runtime.kernels import choice
from shiftadd_cli.runtime.kernels.choice import Kernel, Precision, chosen_kernel, chosen_precision


def test_nothing_said_is_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHIFTADD_KERNEL", raising=False)
    monkeypatch.setenv("SHIFTADD_PRECISION", " ")
    assert chosen_kernel() is Kernel.AUTO
    assert chosen_precision() is Precision.AUTO


def test_values_are_read_whatever_their_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHIFTADD_KERNEL", "Reference")
    monkeypatch.setenv("SHIFTADD_PRECISION", "FAST")
    assert chosen_kernel() is Kernel.REFERENCE
    assert chosen_precision() is Precision.FAST


@pytest.mark.parametrize(("variable", "ask"), [("SHIFTADD_KERNEL", chosen_kernel),
                                               ("SHIFTADD_PRECISION", chosen_precision)])  # fmt: skip
def test_other_values_are_refused_with_the_choices(variable: str, ask: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "quick")
    with pytest.raises(RuntimeChoiceError, match=f"{variable} is 'quick'; give one of auto, "):
        ask()


def test_kernels_that_are_not_there_cannot_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHIFTADD_KERNEL", "cpu")
    monkeypatch.setattr(choice, "cpu_extension", lambda: None)
    with pytest.raises(RuntimeChoiceError, match="install a C\\+\\+ compiler"):
        chosen_kernel()
