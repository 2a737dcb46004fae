"""Gives decoded tensors the names and shapes of a model's files, which may differ from those in memory.

transformers 5 keeps some weights in another form in memory than in files, above all the experts of a mixture. Its
`save_pretrained` reverts that by the rules of `core_model_loading`, for the whole model at once. Here the same rules
are applied to as few tensors at a time as they allow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from shiftadd_cli.artifact.shards import TensorShape
from shiftadd_cli.export.stacks import StackedModel


class OriginalNames:
    """`decoded` in the form of files: `tensors` are shapes and dtypes by name; iteration gives names and tensors.

    decoded: gives tensors by their names in memory. skeleton: the model, on meta.
    """

    def __init__(self, decoded: StackedModel, skeleton: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, WeightConverter

        self._decoded, self._skeleton = decoded, skeleton
        rules = get_model_conversion_mapping(skeleton, add_legacy=False)
        # Like `save_pretrained`, which changes no prefix of a model that transformers has not loaded.
        skeleton._weight_conversions = [rule for rule in rules if not isinstance(rule, PrefixChange)]
        converters = [
            rule.reverse_transform() for rule in skeleton._weight_conversions[::-1] if isinstance(rule, WeightConverter)
        ]
        empty = {name: torch.empty(size, dtype=kind, device="meta") for name, (size, kind) in decoded.tensors.items()}
        self._groups = _groups(empty, converters)
        reverted = self._revert(empty)
        parts = {
            name: tensor
            for group in self._groups
            for name, tensor in self._revert({name: empty[name] for name in group}).items()
        }
        if {name: tensor.shape for name, tensor in parts.items()} != {
            name: tensor.shape for name, tensor in reverted.items()
        }:
            # Some rules act on a tensor only after they have seen another.
            self._groups, parts = [list(empty)], reverted
        self.tensors: dict[str, TensorShape] = {
            name: (tuple(tensor.shape), tensor.dtype) for name, tensor in parts.items()
        }

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors; tensors that depend on one another come once the last of them is decoded."""
        group_of = {name: index for index, group in enumerate(self._groups) for name in group}
        waiting: dict[int, dict[str, Tensor]] = {}
        for name, tensor in self._decoded:
            index = group_of[name]
            waiting.setdefault(index, {})[name] = tensor
            if len(waiting[index]) == len(self._groups[index]):
                yield from self._revert(waiting.pop(index)).items()

    def _revert(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        reverted: dict[str, Tensor] = revert_weight_conversion(self._skeleton, tensors)
        return reverted


def _groups(names: Iterable[str], converters: list[Any]) -> list[list[str]]:
    """Names of tensors grouped by the application of a rule that takes them, in the order of each group's first."""
    from transformers.core_model_loading import apply_converters

    groups: dict[str, list[str]] = {}
    for name in names:
        target, pattern = apply_converters(name, converters)
        groups.setdefault(name if pattern is None else target, []).append(name)
    return list(groups.values())
