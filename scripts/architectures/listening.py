"""Records the inputs of a model's modules from outside, while other code runs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The floating-point tensor that a module works on: its first argument, or `hidden_states`."""
    given = args[0] if args else kwargs.get("hidden_states")
    return given if isinstance(given, Tensor) and given.is_floating_point() else None


@dataclass
class Heard:
    """Inputs of modules, recorded during a run of the product.

    `batches`: inputs of whole models (tokens or pixels), in the order of their first appearance. `inputs`: by shape,
    inputs of modules outside a whole model's own forward; `within`: those inside one.
    """

    batches: list[Tensor] = field(default_factory=list)
    inputs: dict[tuple[int, ...], list[Tensor]] = field(default_factory=dict)
    within: dict[tuple[int, ...], list[Tensor]] = field(default_factory=dict)

    def note_batch(self, batch: Tensor | None) -> None:
        """Keep a batch that is seen for the first time."""
        if batch is None or batch.is_meta or any(torch.equal(batch.detach(), seen) for seen in self.batches):
            return
        self.batches.append(batch.detach().clone())

    def distance(self, expected: Tensor) -> float:
        """Relative error of the nearest recorded input; infinite if none has the shape.

        Inside a whole model's own forward every input is right, whatever the product calibrates on. So those count only
        if no input of the shape was recorded outside of one.
        """
        shape = tuple(expected.shape)
        candidates = self.inputs.get(shape) or self.within.get(shape) or []
        norm = float(expected.norm()) or 1.0
        return min((float((tensor - expected).norm()) / norm for tensor in candidates), default=float("inf"))


@contextmanager
def listening() -> Iterator[Heard]:
    """Record all inputs of modules inside this context."""
    from transformers import PreTrainedModel

    heard, depth, call = Heard(), 0, nn.Module.__call__

    def listened(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        is_model = isinstance(module, PreTrainedModel)
        if is_model and not depth:
            heard.note_batch(kwargs.get("input_ids", kwargs.get("pixel_values")))
        depth += is_model
        try:
            tensor = first_tensor(args, kwargs)
            if tensor is not None and not tensor.is_meta:
                into = heard.within if depth else heard.inputs
                into.setdefault(tuple(tensor.shape), []).append(tensor.detach().float().clone())
            return call(module, *args, **kwargs)
        finally:
            depth -= is_model

    nn.Module.__call__ = listened  # type: ignore[method-assign]
    try:
        yield heard
    finally:
        nn.Module.__call__ = call  # type: ignore[method-assign]
