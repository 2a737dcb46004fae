from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shiftadd_cli.bcq.choices import (
    CODE_BITS,
    Choice,
    choice_of,
    choice_symbols,
    choices_in_words,
    has_planes,
    ordered_choices,
    parse_choice,
    parts_of_choice,
    table_form,
)
from shiftadd_cli.bcq.primitives import PRIMITIVES

ALL = [choice_of(primitive, bits) for primitive, widths in CODE_BITS.items() for bits in widths]


@pytest.mark.parametrize("choice", ALL)
def test_a_choice_survives_its_parts_and_its_text(choice: Choice) -> None:
    assert choice_of(*parts_of_choice(choice)) == choice
    assert parse_choice(choice) == choice == parse_choice(f" {choice} ")


def test_short_words_stand_for_usual_widths() -> None:
    assert (parse_choice("shift1"), parse_choice("shift2")) == ("shift1-3", "shift2-4")


@pytest.mark.parametrize("value", [0, 9, True, 3.0, None, "", "9", "-3", "shift3", "shift1-5", "shift2-", "shift1-03"])
def test_other_values_are_refused_with_the_valid_ones(value: object) -> None:
    with pytest.raises(ValueError, match=r"planes from 1 to 8.*shift1, shift2"):
        parse_choice(value)


@given(st.lists(st.sampled_from(ALL)))
def test_ordered_choices_do_not_depend_on_their_input_order(choices: list[Choice]) -> None:
    ordered = ordered_choices(choices)
    assert ordered == ordered_choices(reversed(choices))
    assert set(ordered) == set(choices)
    assert (
        sorted(choice for choice in ordered if isinstance(choice, int))
        == list(ordered)[: len(ordered) - _words(ordered)]
    )
    symbols = choice_symbols(choices)
    assert list(symbols) == list(ordered)
    assert len(set(symbols.values())) == len(ordered)
    assert all(len(symbol) == 1 for symbol in symbols.values())


def _words(choices: tuple[Choice, ...]) -> int:
    return sum(isinstance(choice, str) for choice in choices)


@pytest.mark.parametrize(
    ("choices", "text"),
    [
        ([3, 3], "3"),
        ([4, 2, 2], "2-4"),
        (["shift2-4", 3], "3, shift2-4"),
        (["shift1-3", "shift2-4"] * 2, "shift1-3, shift2-4"),
    ],
)
def test_several_choices_are_described_in_a_few_words(choices: list[Choice], text: str) -> None:
    assert choices_in_words(choices) == text


def test_forms_of_planes_are_those_with_kernels() -> None:
    for choice in ALL:
        assert has_planes(choice) == PRIMITIVES[parts_of_choice(choice)[0]].lookup_kernels


def test_eight_bits_of_an_embedding_are_rows() -> None:
    assert [table_form(choice) for choice in (8, 5, "trellis1-4")] == ["8-bit rows", "5 bits", "trellis1-4"]
