"""Class names of images and of models."""

from __future__ import annotations

import pytest

from shiftadd_cli.errors import CalibrationError
from shiftadd_cli.evaluation.labels import class_numbers

NAMES = {0: "tench, Tinca tinca", 1: "Fire_truck", 2: "LABEL_2", 3: "bird"}


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["fire truck", "tench", "tinca tinca", "BIRD"], [1, 0, 0, 3]),
        ([2, 0, "3"], [2, 0, 3]),
        (["fire-truck", 1], [1, 1]),
    ],
)
def test_labels_match_by_name_and_then_by_number(labels: list[str | int], expected: list[int]) -> None:
    assert class_numbers(labels, NAMES, "the images", "the model").tolist() == expected


def test_a_name_that_is_a_number_is_a_name_first() -> None:
    assert class_numbers(["7", 8], {0: "8", 1: "7"}, "the images", "the model").tolist() == [1, 0]


def test_wordnet_ids_are_numbered_in_sorted_order() -> None:
    labels = ["n02000000", "n01000000", "n04000000", "n03000000", "n01000000"]
    assert class_numbers(labels, NAMES, "the images", "the model").tolist() == [1, 0, 3, 2, 0]
    with pytest.raises(CalibrationError, match="3 of the 3 classes"):
        class_numbers(labels[:3], NAMES, "the images", "the model")


def test_classes_unknown_to_the_model_are_refused() -> None:
    with pytest.raises(
        CalibrationError, match=r"2 of the 3 classes of the images \(such as 4\) are not classes of"
    ) as caught:
        class_numbers(["bird", "dragon", 4], NAMES, "the images", "the model")
    assert "\n" not in str(caught.value)
