"""Map the class names of labelled images to the class numbers of a model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor, tensor

from shiftadd_cli.errors import CalibrationError

_WORDNET = re.compile(r"n\d{8}")


def class_numbers(labels: Sequence[str | int], names: Mapping[int, str], data: str, model: str) -> Tensor:
    """The class of every image by the model's numbering: int64 `[images]`.

    Labels are matched by name first, then by number. Case, `_` and `-` do not matter in names, and any part of a name
    like `tench, Tinca tinca` matches. If the labels are WordNet ids (`n01440764`), as many as the model has classes,
    they are numbered in sorted order, like the classes of ImageNet. names: the model's `id2label`; `data` and `model`
    are for messages.

    Raises:
        CalibrationError: the model lacks a label.
    """
    distinct = sorted(set(labels), key=str)
    if len(distinct) == len(names) and all(isinstance(label, str) and _WORDNET.fullmatch(label) for label in distinct):
        numbers: dict[str | int, int | None] = {label: number for number, label in enumerate(distinct)}
    else:
        by_name: dict[str, int] = {}
        for number, name in names.items():
            for part in (name, *name.split(",")):
                by_name.setdefault(_plain(part), number)
        numbers = {label: _number(label, by_name, names) for label in distinct}
    missing = [label for label, number in numbers.items() if number is None]
    if missing:
        examples = ", ".join(str(names[number]) for number in sorted(names)[:3])
        raise CalibrationError(
            f"{len(missing)} of the {len(distinct)} classes of {data} (such as {missing[0]!r}) are not classes of "
            f"{model}, which has {len(names)} (such as {examples}); give images of these, or rename the classes."
        )
    return tensor([numbers[label] for label in labels])


def _number(label: str | int, by_name: Mapping[str, int], names: Mapping[int, str]) -> int | None:
    if (match := by_name.get(_plain(str(label)))) is not None:
        return match
    number = int(label) if str(label).isdecimal() else None
    return number if number in names else None


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()
