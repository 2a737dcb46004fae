"""The words for what pydantic refuses."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ValidationError, field_validator

from shiftadd_cli.errors import Fault, first_fault


class Layer(BaseModel):
    bits: int

    @field_validator("bits")
    @classmethod
    def _even(cls, bits):
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
def test_the_first_fault_has_its_place_and_our_own_words(values, fault):
    with pytest.raises(ValidationError) as caught:
        Plan.model_validate(values)
    assert first_fault(caught.value) == fault


def test_a_fault_of_the_whole_has_no_place():
    with pytest.raises(ValidationError) as caught:
        Plan.model_validate(3)
    assert first_fault(caught.value).place == ()
