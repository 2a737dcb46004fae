"""From the class names of labelled images to the class numbers of a model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor, tensor

from shiftadd_cli.errors import CalibrationError

_WORDNET = re.compile(r"n\d{8}")


def class_numbers(labels: Sequence[str | int], names: Mapping[int, str], data: str, model: str) -> Tensor:
    """The class of every image as the model numbers them: int64 `[images]`.

    By name first (capitals, `_` and `-` do not matter; of `tench, Tinca tinca` each part will do), then by number.
    Names that are WordNet's (`n01440764`), as many as the model has classes, are numbered in their order, as ImageNet's
    classes are. names: the model's `id2label`; `data` and `model` are for messages.

    Raises:
        CalibrationError: there is a label that the model does not have.
    """
    distinct = sorted(set(labels), key=str)
    if len(distinct) == len(names) and all(isinstance(each, str) and _WORDNET.fullmatch(each) for each in distinct):
        numbers: dict[str | int, int | None] = {each: place for place, each in enumerate(distinct)}
    else:
        known: dict[str, int] = {}
        for number, name in names.items():
            for part in (name, *name.split(",")):
                known.setdefault(_plain(part), number)
        numbers = {each: _number(each, known, names) for each in distinct}
    missing = [each for each, number in numbers.items() if number is None]
    if missing:
        examples = ", ".join(str(names[number]) for number in sorted(names)[:3])
        raise CalibrationError(
            f"{len(missing)} of the {len(distinct)} classes of {data} (such as {missing[0]!r}) are no classes of "
            f"{model}, which has {len(names)} (such as {examples}); give images of these, or rename the classes."
        )
    return tensor([numbers[each] for each in labels])


def _number(label: str | int, known: Mapping[str, int], names: Mapping[int, str]) -> int | None:
    if (found := known.get(_plain(str(label)))) is not None:
        return found
    number = int(label) if str(label).isdecimal() else None
    return number if number in names else None


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()
