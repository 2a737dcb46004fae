"""Messages for values that pydantic refuses."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError, field_validator

from shiftadd_cli.errors import Fault, first_fault


class Layer(BaseModel):
    bits: int

    @field_validator("bits")
    @classmethod
    def _even(cls, bits: int) -> int:
        if bits % 2:
            raise ValueError("must be even")
        return bits


class Plan(BaseModel):
    layers: dict[str, list[Layer]]


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"layers": {"q": [{"bits": 2}, {"bits": 3}]}}, Fault(("layers", "q", "1", "bits"), "must be even")),
        ({}, Fault(("layers",), "Field required")),
    ],
)
def test_first_fault_has_its_path_and_our_message(values: dict[str, Any], fault: Fault) -> None:
    with pytest.raises(ValidationError) as caught:
        Plan.model_validate(values)
    assert first_fault(caught.value) == fault


def test_fault_of_the_top_level_value_has_no_path() -> None:
    with pytest.raises(ValidationError) as caught:
        Plan.model_validate(3)
    assert first_fault(caught.value).place == ()
