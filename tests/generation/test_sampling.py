"""Invalid settings are refused with a message that names the option."""

from __future__ import annotations

import math
from typing import Any

import pytest

from shiftadd_cli.errors import RecipeError
from shiftadd_cli.generation.sampling import Sampling

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no tokens": ({"max_new_tokens": 0}, "`max_new_tokens` 0"),
    "negative temperature": ({"temperature": -0.5}, r"`temperature` -0\.5"),
    "NaN temperature": ({"temperature": math.nan}, "`temperature` nan"),
    "infinite temperature": ({"temperature": math.inf}, "`temperature` inf"),
    "zero top-p": ({"temperature": 1.0, "top_p": 0.0}, "`top_p` 0 "),
    "top-p above 1": ({"temperature": 1.0, "top_p": 1.5}, r"`top_p` 1\.5"),
    "NaN top-p": ({"temperature": 1.0, "top_p": math.nan}, "`top_p` nan"),
    "top-p without draws": ({"top_p": 0.9}, "changes nothing at temperature 0"),
    "negative seed": ({"seed": -1}, "`seed` -1"),
    "seed beyond torch's": ({"seed": 1 << 64}, "`seed`"),
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_values_are_refused(case: str) -> None:
    fields, message = BAD[case]
    with pytest.raises(RecipeError, match=message):
        Sampling(**fields)


def test_the_limits_are_valid() -> None:
    assert Sampling().temperature == 0
    Sampling(max_new_tokens=1, temperature=1e-3, top_p=1.0, seed=(1 << 63) - 1)
