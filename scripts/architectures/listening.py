"""What the modules of a model are given, seen from outside while somebody else runs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The tensor of numbers that a module works on: its first argument, or what is named hidden_states."""
    given = args[0] if args else kwargs.get("hidden_states")
    return given if isinstance(given, Tensor) and given.is_floating_point() else None


@dataclass
class Heard:
    """What was given to modules while a product was at work.

    `batches`: what whole models were given (tokens or pixels), in the order of their first time. `inputs`: by shape,
    the tensors that modules were given outside a whole model's own forward; `within` those inside one.
    """

    batches: list[Tensor] = field(default_factory=list)
    inputs: dict[tuple[int, ...], list[Tensor]] = field(default_factory=dict)
    within: dict[tuple[int, ...], list[Tensor]] = field(default_factory=dict)

    def note_batch(self, batch: Tensor | None) -> None:
        """Keep a batch that is seen for the first time."""
        if batch is None or batch.is_meta or any(torch.equal(batch.detach(), known) for known in self.batches):
            return
        self.batches.append(batch.detach().clone())

    def distance(self, wanted: Tensor) -> float:
        """Relative error of the nearest tensor that a module was given; infinite where none has the shape.

        Inside a whole model's own forward every input is right, whatever the product calibrates on: that counts only
        where nothing of the shape was seen outside of one.
        """
        shape = tuple(wanted.shape)
        candidates = self.inputs.get(shape) or self.within.get(shape) or []
        norm = float(wanted.norm()) or 1.0
        return min((float((given - wanted).norm()) / norm for given in candidates), default=float("inf"))


@contextmanager
def listening() -> Iterator[Heard]:
    """Hear everything that modules are given while this lasts."""
    from transformers import PreTrainedModel

    heard, depth, call = Heard(), 0, nn.Module.__call__

    def listened(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        whole = isinstance(module, PreTrainedModel)
        if whole and not depth:
            heard.note_batch(kwargs.get("input_ids", kwargs.get("pixel_values")))
        depth += whole
        try:
            given = first_tensor(args, kwargs)
            if given is not None and not given.is_meta:
                into = heard.within if depth else heard.inputs
                into.setdefault(tuple(given.shape), []).append(given.detach().float().clone())
            return call(module, *args, **kwargs)
        finally:
            depth -= whole

    nn.Module.__call__ = listened  # type: ignore[method-assign]
    try:
        yield heard
    finally:
        nn.Module.__call__ = call  # type: ignore[method-assign]
