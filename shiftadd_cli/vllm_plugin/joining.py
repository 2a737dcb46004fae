"""Compressed matrices that multiply the same input, stacked into one, so that they take one call and one rotation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from shiftadd_cli.bcq.weight import PackedLayout, QuantizedWeight

# Stored once for the whole matrix, whatever its number of rows.
_OF_COLUMNS = ("weight_signs", "weight_column_ids")


def can_join(first: QuantizedWeight, second: QuantizedWeight) -> bool:
    """Whether one matrix can hold the rows of the first and, below them, those of the second: equal forms except for
    the number of rows, no scales shared between rows, the first in whole stripes, and the same rotation and outlier
    columns."""
    if first.layout.grid.group_rows != 1 or _form(first.layout) != _form(second.layout):
        return False
    if first.layout.rows % first.layout.primitive.stripe:
        return False
    return all(torch.equal(first.tensors[name], second.tensors[name]) for name in _OF_COLUMNS if name in first.tensors)


def join(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """The matrices stacked into one; each must satisfy `can_join` with the one above. A single one is returned itself.

    Every weight decodes to the same number as before. A row scale of a whole matrix is repeated for each of its rows.
    """
    if len(weights) == 1:
        return weights[0]
    rows = sum(weight.layout.rows for weight in weights)
    first = weights[0]
    layout = replace(_form(first.layout), rows=rows)
    tensors = {
        name: tensor if name in _OF_COLUMNS else torch.cat([_of_rows(weight, name) for weight in weights])
        for name, tensor in first.tensors.items()
    }
    return QuantizedWeight(layout, tensors)


def runs(weights: Sequence[QuantizedWeight]) -> list[list[QuantizedWeight]]:
    """The matrices in their order, with neighbours grouped if they can be joined."""
    grouped: list[list[QuantizedWeight]] = []
    for weight in weights:
        if grouped and can_join(grouped[-1][-1], weight):
            grouped[-1].append(weight)
        else:
            grouped.append([weight])
    return grouped


def _form(layout: PackedLayout) -> PackedLayout:
    """The layout without the fields that may differ between joined matrices."""
    return replace(layout, rows=1, format=layout.format.replaced(row_scale=True))


def _of_rows(weight: QuantizedWeight, name: str) -> Tensor:
    tensor = weight.tensors[name]
    if name == "weight_row_scale":
        return tensor.expand(weight.layout.rows)
    return tensor
