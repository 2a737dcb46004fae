"""Puts decoded experts back into stacks, as transformers' own classes keep them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from shiftadd_cli.artifact.shards import TensorShape
from shiftadd_cli.export.decode import DecodedModel
from shiftadd_cli.source.experts import SplitExperts
from shiftadd_cli.source.skeleton import set_tensor


class StackedModel:
    """`decoded`, which has its experts one by one, with the names, shapes and values of the model in transformers.

    skeleton: that of `decoded`; iteration fills its experts, one mixture at a time, and empties them again.
    """

    def __init__(self, decoded: DecodedModel, skeleton: Any) -> None:
        self._decoded, self._skeleton = decoded, skeleton
        self._mixtures = {name: module for name, module in skeleton.named_modules() if isinstance(module, SplitExperts)}
        self.tensors: dict[str, TensorShape] = {}
        for name, shape in decoded.tensors.items():
            if (mixture := self._mixture(name)) is None:
                self.tensors[name] = shape
            else:
                self.tensors |= {f"{mixture}.{stack}": own for stack, own in self._mixtures[mixture].shapes.items()}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors as in `DecodedModel`, except that a stack of experts comes once all of them are decoded."""
        for name, tensor in self._decoded:
            if (mixture := self._mixture(name)) is None:
                yield name, tensor
                continue
            set_tensor(self._skeleton, name, tensor)
            experts = self._mixtures[mixture]
            if not experts.is_empty:
                for stack, joined in experts.joined_stacks():
                    yield f"{mixture}.{stack}", joined

    def _mixture(self, name: str) -> str | None:
        return next((mixture for mixture in self._mixtures if name.startswith(f"{mixture}.")), None)
