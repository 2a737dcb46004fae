"""Divergence of a compressed model's predictions from the original's, and its gradient after the last block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from shiftadd_cli.blockwise.distribution import comparable, reference_of
from shiftadd_cli.blockwise.head import Form, Head
from shiftadd_cli.blockwise.model import BlockwiseModel
from shiftadd_cli.distillation.vectors import Reader, TunedVectors
from shiftadd_cli.source.skeleton import set_tensor

# Per logit: the original's log-probability and probability, and about five float32 values for the compressed model's
# forward and backward pass.
SLICE_BYTES = 256 << 20
_BYTES_PER_LOGIT = 32


class Gap(NamedTuple):
    """Sum over the predictions of a batch of KL(original || compressed), in nats (or of 1 - cosine of features for a
    model without a head), the number of predictions, and the gradient of the sum at the compressed model's hidden
    states, in their shape and dtype. A sum, since gradients of a mean would be too small for float16."""

    divergence: float
    predictions: int
    gradient: Tensor


class EndGap:
    """Computes a `Gap` from the hidden states of both models after the last block. `samples`: see `trace_model`; `read`
    returns tensors as the artifact stores them.

    Everything outside the blocks must be loaded, as the artifact stores it. Only the compressed model uses the tuned
    vectors there.

    originals: the weights that the original has instead of the compressed ones after the blocks, by name; its other
        weights are those of the compressed model.

    Attributes:
        vectors: one-dimensional parameters outside the blocks, by name; those before the blocks never get a gradient.
    """

    def __init__(
        self,
        model: BlockwiseModel,
        forms: Sequence[Form],
        samples: Tensor,
        read: Reader,
        originals: Mapping[str, Tensor],
    ) -> None:
        self._model, self._device = model.skeleton, model.device
        self._head = Head(model, forms, samples)
        self._most = max(1, SLICE_BYTES // (_BYTES_PER_LOGIT * self._head.classes))
        blocks = tuple(f"{name}." for name in model.names)
        outside = [
            (name, parameter) for name, parameter in self._model.named_parameters() if not name.startswith(blocks)
        ]
        self.vectors = TunedVectors(outside, read, self._device)
        self._originals = originals

    def gap(self, first: int, hidden: Tensor, original: Tensor, *, learn: bool) -> Gap:
        """The gap for the samples from number `first` on, given hidden states `[batch, tokens, width]` of both models.

        learn: compute gradients, and add to those of `vectors`; otherwise the gradient is zero.
        """
        total, gradient = 0.0, torch.zeros_like(hidden)
        for rows, tokens in self._head.parts(len(hidden), hidden.shape[1], self._most):
            samples = slice(first + rows.start, first + rows.stop)
            with self._holding(self._originals), torch.no_grad():
                target = self._head.predict(original[rows, tokens].to(self._device), samples, tokens)
            reference = reference_of(target)
            states = hidden[rows, tokens].to(self._device).requires_grad_(learn)
            leaves = {
                name: nn.Parameter(vector.detach(), requires_grad=learn)
                for name, vector in self.vectors.computed().items()
            }
            with self._holding(leaves), torch.set_grad_enabled(learn):
                prediction = self._head.predict(states, samples, tokens)
                loss = reference.divergence(comparable(prediction)).sum()
            total += float(loss.detach())
            if learn:
                torch.autograd.backward(loss, inputs=[states, *leaves.values()])
                assert states.grad is not None, "predictions depend on hidden states"
                gradient[rows, tokens] = states.grad.to(gradient)
                self._add(leaves)
        return Gap(total, len(hidden) * (hidden.shape[1] if self._head.per_token else 1), gradient)

    def _add(self, leaves: dict[str, nn.Parameter]) -> None:
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                vector, gradient = self.vectors.free[name], leaf.grad.float()
                vector.grad = gradient if vector.grad is None else vector.grad + gradient

    @contextmanager
    def _holding(self, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        """Replace the model's own parameters of these names inside the context."""
        own = {name: self._model.get_parameter(name) for name in parameters}
        try:
            for name, parameter in parameters.items():
                set_tensor(self._model, name, parameter)
            yield
        finally:
            for name, parameter in own.items():
                set_tensor(self._model, name, parameter)
