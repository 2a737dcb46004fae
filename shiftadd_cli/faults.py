"""What is wrong with values that pydantic refuses, in words for a sentence of ours."""

from __future__ import annotations

from typing import NamedTuple

from pydantic import ValidationError


class Fault(NamedTuple):
    """place: keys and indices that lead to the value, from the outside in; message: what is wrong with it."""

    place: tuple[str, ...]
    message: str


def first_fault(failure: ValidationError) -> Fault:
    """The first of what was found."""
    error = failure.errors()[0]
    # pydantic puts this before what validators of ours say.
    return Fault(tuple(map(str, error["loc"])), error["msg"].removeprefix("Value error, "))
