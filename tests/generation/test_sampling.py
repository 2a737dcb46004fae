"""Settings that mean nothing are refused with a sentence that names the option."""

from __future__ import annotations

import math

import pytest

from shiftadd_cli.errors import RecipeError
from shiftadd_cli.generation.sampling import Sampling

BAD = {
    "no tokens": ({"max_new_tokens": 0}, "`max_new_tokens` 0"),
    "negative temperature": ({"temperature": -0.5}, r"`temperature` -0\.5"),
    "temperature that is no number": ({"temperature": math.nan}, "`temperature` nan"),
    "endless temperature": ({"temperature": math.inf}, "`temperature` inf"),
    "no probability": ({"temperature": 1.0, "top_p": 0.0}, "`top_p` 0 "),
    "more than all": ({"temperature": 1.0, "top_p": 1.5}, r"`top_p` 1\.5"),
    "probability that is no number": ({"temperature": 1.0, "top_p": math.nan}, "`top_p` nan"),
    "top-p without draws": ({"top_p": 0.9}, "changes nothing at temperature 0"),
    "negative seed": ({"seed": -1}, "`seed` -1"),
    "seed beyond torch's": ({"seed": 1 << 64}, "`seed`"),
}


@pytest.mark.parametrize("case", BAD)
def test_values_that_mean_nothing_are_refused(case):
    fields, message = BAD[case]
    with pytest.raises(RecipeError, match=message):
        Sampling(**fields)


def test_the_edges_are_valid():
    assert Sampling().temperature == 0
    Sampling(max_new_tokens=1, temperature=1e-3, top_p=1.0, seed=(1 << 63) - 1)
