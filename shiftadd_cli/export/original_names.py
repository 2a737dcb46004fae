"""Decoded tensors under the names and in the shapes that a model's files have, which need not be those in memory.

transformers 5 keeps some weights in another form in memory than in files, above all the experts of a mixture. Its
`save_pretrained` turns that back by the rules of `core_model_loading`, for the whole model at once. Here the same rules
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
    """`decoded` as files have it: `tensors` are shapes and dtypes by name, iterating gives names and tensors.

    decoded: gives tensors by their names in memory. skeleton: the model, on meta.
    """

    def __init__(self, decoded: StackedModel, skeleton: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, WeightConverter

        self._decoded, self._skeleton = decoded, skeleton
        rules = get_model_conversion_mapping(skeleton, add_legacy=False)
        # `save_pretrained` applies no change of prefix either to a model that it has not seen loaded.
        skeleton._weight_conversions = [rule for rule in rules if not isinstance(rule, PrefixChange)]
        converters = [
            rule.reverse_transform() for rule in skeleton._weight_conversions[::-1] if isinstance(rule, WeightConverter)
        ]
        empty = {name: torch.empty(size, dtype=kind, device="meta") for name, (size, kind) in decoded.tensors.items()}
        self._groups = _groups(empty, converters)
        whole = self._revert(empty)
        parts = {
            name: tensor
            for group in self._groups
            for name, tensor in self._revert({name: empty[name] for name in group}).items()
        }
        if {name: each.shape for name, each in parts.items()} != {name: each.shape for name, each in whole.items()}:
            # Some rules act on a tensor only after another was there.
            self._groups, parts = [list(empty)], whole
        self.tensors: dict[str, TensorShape] = {name: (tuple(each.shape), each.dtype) for name, each in parts.items()}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors; those that are made of one another come as soon as the last of them is decoded."""
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
    """Names of tensors that the same application of a rule takes, in the order of their first."""
    from transformers.core_model_loading import apply_converters

    groups: dict[str, list[str]] = {}
    for name in names:
        target, pattern = apply_converters(name, converters)
        groups.setdefault(name if pattern is None else target, []).append(name)
    return list(groups.values())
