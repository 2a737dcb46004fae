from __future__ import annotations

from typing import Any

import pytest
from formats import matrix_format
from pydantic import ValidationError

from shiftadd_cli.bcq.choices import ALL_CHOICES, CODE_BITS
from shiftadd_cli.bcq.matrix_format import MatrixFormat, MatrixStorage
from shiftadd_cli.bcq.primitives import PRIMITIVES


def test_every_choice_has_a_format_and_every_primitive_a_class() -> None:
    storage = matrix_format().part(MatrixStorage)
    for choice in ALL_CHOICES:
        form = storage.at(choice)
        assert form.choice == choice
        assert form.part(MatrixStorage) == storage
    assert PRIMITIVES.keys() == CODE_BITS.keys()
    assert all(primitive.name == name for name, primitive in PRIMITIVES.items())


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"bits": 0}, "bits"),
        ({"bits": 9}, "bits"),
        ({"primitive": "shift1", "bits": 5}, "bits"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": 10**9}, "group_size"),
        ({"group_size": "1/8"}, "group_size"),
        ({"group_rows": "1/0"}, "group_rows"),
        ({"scale_format": "apot4"}, "scale_format"),
        ({"outlier_columns": 0.3}, "outlier_columns"),
        ({"rotation": True}, "rotation"),
        ({"offset": 1}, "offset"),
    ],
)
def test_invalid_values_are_refused(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        matrix_format(**fields)


def test_a_format_cannot_be_changed_in_place_or_have_other_fields() -> None:
    form = matrix_format()
    with pytest.raises(ValidationError):
        form.bits = 2
    with pytest.raises(ValidationError, match="levels"):
        form.replaced(levels=3)
    with pytest.raises(ValidationError, match="bits"):
        form.replaced(bits=9)
    assert form.replaced(bits=2) == MatrixFormat(**(form.model_dump() | {"bits": 2}))
