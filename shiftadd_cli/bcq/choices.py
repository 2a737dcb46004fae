"""What a layer can be stored as: a primitive, and the bits of a weight's code.

A *choice* is a number, so many binary planes, or a word: `shift1-3` is one power of two in a code of 3 bits, `shift2-4`
a sum of two in 4. `shift1` and `shift2` alone are short for these two.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeAlias, cast

Primitive = Literal["bcq", "shift1", "shift2"]
Choice: TypeAlias = int | str

# The bits that a weight's code can have, ascending.
CODE_BITS: dict[Primitive, tuple[int, ...]] = {
    "bcq": (1, 2, 3, 4, 5, 6, 7, 8),
    "shift1": (2, 3, 4),
    "shift2": (2, 3, 4, 5),
}
# The primitive that a recipe and a checkpoint have where they name none.
PLANES: Primitive = "bcq"
_WORDS = tuple(
    f"{primitive}-{bits}" for primitive, widths in CODE_BITS.items() if primitive != PLANES for bits in widths
)
_SHORT = {"shift1": "shift1-3", "shift2": "shift2-4"}


def choice_of(primitive: Primitive, bits: int) -> Choice:
    """The choice of these parts."""
    return bits if primitive == PLANES else f"{primitive}-{bits}"


def parts_of_choice(choice: Choice) -> tuple[Primitive, int]:
    """Primitive and bits of a choice."""
    if isinstance(choice, int):
        return PLANES, choice
    primitive, _, bits = choice.partition("-")
    return cast(Primitive, primitive), int(bits)


def bits_of_choice(choice: Choice) -> int:
    """Bits of a weight's code."""
    return parts_of_choice(choice)[1]


def parse_choice(value: object) -> Choice:
    """A choice from a number, its digits or its word. Raises ValueError for what is none."""
    if isinstance(value, str):
        word = value.strip()
        word = _SHORT.get(word, word)
        if word in _WORDS:
            return word
        value = int(word) if word.isdecimal() else value
    if type(value) is int and value in CODE_BITS[PLANES]:
        return value
    raise ValueError(f"{value!r} is no number of planes from 1 to 8 and none of {', '.join((*_SHORT, *_WORDS))}")


ALL_CHOICES = tuple(choice_of(primitive, bits) for primitive, widths in CODE_BITS.items() for bits in widths)


def ordered_choices(choices: Iterable[Choice]) -> tuple[Choice, ...]:
    """Each once: planes by their number, then shifts by their words."""
    return tuple(sorted(set(choices), key=lambda choice: (isinstance(choice, str), choice)))


def choices_in_words(choices: Iterable[Choice]) -> str:
    """Of several layers: `3`, `2-4` for what lies between two numbers of planes, `2-4, shift2-4`."""
    found = ordered_choices(choices)
    planes = [str(each) for each in found if isinstance(each, int)]
    span = planes[:1] if len(planes) < 2 else [f"{planes[0]}-{planes[-1]}"]
    return ", ".join(span + [each for each in found if isinstance(each, str)])


def choice_words(choice: Choice) -> str:
    """For a sentence: `3 bits`, or `shift1-3`."""
    return f"{choice} bits" if isinstance(choice, int) else choice


def choice_symbols(choices: Iterable[Choice]) -> dict[Choice, str]:
    """One character for each, in order: numbers of planes as they are, shifts as letters from `a` on."""
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    return {each: str(each) if isinstance(each, int) else next(letters) for each in ordered_choices(choices)}
