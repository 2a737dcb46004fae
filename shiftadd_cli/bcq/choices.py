"""The ways to store a layer: a primitive and the number of bits in a weight's code.

A *choice* is a number of binary planes, or a word: `trellis1-2` is 3 planes computed from 2 stored bits, `trellis2-2` 4
planes; `shift1-3` is one power of two in a code of 3 bits, `shift2-4` a sum of two in a code of 4 bits. `shift1` and
`shift2` are short for the last two.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal, TypeAlias, cast

Primitive = Literal["bcq", "trellis1", "trellis2", "shift1", "shift2"]
Choice: TypeAlias = int | str

# The supported bits of a weight's code, ascending.
CODE_BITS: dict[Primitive, tuple[int, ...]] = {
    "bcq": (1, 2, 3, 4, 5, 6, 7, 8),
    "trellis1": (1, 2, 3, 4),
    "trellis2": (2, 3),
    "shift1": (2, 3, 4),
    "shift2": (2, 3, 4, 5),
}
# For an embedding or a head, 8 bits are not planes: 8-bit rows are as small, better and faster.
ROWS: Final = 8
# The default primitive of recipes and checkpoints.
PLANES: Primitive = "bcq"
_WORDS = tuple(
    f"{primitive}-{bits}" for primitive, widths in CODE_BITS.items() if primitive != PLANES for bits in widths
)
_SHORT = {"shift1": "shift1-3", "shift2": "shift2-4"}


def choice_of(primitive: Primitive, bits: int) -> Choice:
    """The choice for a primitive and its bits."""
    return bits if primitive == PLANES else f"{primitive}-{bits}"


def parts_of_choice(choice: Choice) -> tuple[Primitive, int]:
    """The primitive and the bits of a choice."""
    if isinstance(choice, int):
        return PLANES, choice
    primitive, _, bits = choice.partition("-")
    return cast(Primitive, primitive), int(bits)


def bits_of_choice(choice: Choice) -> int:
    """The bits of a weight's code."""
    return parts_of_choice(choice)[1]


def has_planes(choice: Choice) -> bool:
    """Whether the form consists of planes, stored or computed, which the look-up kernels multiply by."""
    return parts_of_choice(choice)[0] in (PLANES, "trellis1", "trellis2")


def parse_choice(value: object) -> Choice:
    """The choice for a number, its digits or its word. Raises ValueError for anything else."""
    if isinstance(value, str):
        word = value.strip()
        word = _SHORT.get(word, word)
        if word in _WORDS:
            return word
        value = int(word) if word.isdecimal() else value
    if type(value) is int and value in CODE_BITS[PLANES]:
        return value
    words = [*_SHORT, *(f"{name}-{bits[0]} to {bits[-1]}" for name, bits in CODE_BITS.items() if name != PLANES)]
    raise ValueError(f"{value!r} is neither a number of planes from 1 to 8 nor one of {', '.join(words)}")


ALL_CHOICES = tuple(choice_of(primitive, bits) for primitive, widths in CODE_BITS.items() for bits in widths)


def ordered_choices(choices: Iterable[Choice]) -> tuple[Choice, ...]:
    """The distinct choices: planes by number, then the others by word."""
    return tuple(sorted(set(choices), key=lambda choice: (isinstance(choice, str), choice)))


def choices_in_words(choices: Iterable[Choice]) -> str:
    """A summary of the choices of several layers: `3`, `2-4` for a range of planes, `2-4, shift2-4`."""
    ordered = ordered_choices(choices)
    planes = [str(choice) for choice in ordered if isinstance(choice, int)]
    span = planes[:1] if len(planes) < 2 else [f"{planes[0]}-{planes[-1]}"]
    return ", ".join(span + [choice for choice in ordered if isinstance(choice, str)])


def choice_words(choice: Choice) -> str:
    """The choice as part of a sentence: `3 bits`, or `shift1-3`."""
    return f"{choice} bits" if isinstance(choice, int) else choice


def table_words(primitive: Primitive | None, bits: int) -> str:
    """The form of an embedding or a head in words: `8-bit rows` without a primitive, `5 bits`, or `trellis1-4`."""
    return table_form(ROWS if primitive is None else choice_of(primitive, bits))


def table_form(choice: Choice) -> str:
    """The same from its choice, where `ROWS` stands for 8-bit rows."""
    return "8-bit rows" if choice == ROWS else choice_words(choice)


def choice_symbols(choices: Iterable[Choice]) -> dict[Choice, str]:
    """One character per choice, in order: the digit for planes, letters from `a` on for the others."""
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    return {choice: str(choice) if isinstance(choice, int) else next(letters) for choice in ordered_choices(choices)}
