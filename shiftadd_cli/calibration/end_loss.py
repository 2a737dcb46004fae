"""The gradient of the end loss at the output of the last block, through the model's own norm and head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from shiftadd_cli.blockwise.head import Form, Head
from shiftadd_cli.blockwise.model import BlockwiseModel

Loss = Literal["divergence", "cross_entropy"]

# Upper limit for the logits held at once, together with their gradient and two float32 copies.
_SLICE_BYTES = 256 << 20
_BYTES_PER_LOGIT = 16


class EndLoss:
    """The loss of `samples` (see `trace_model`) as a function of the last block's output.

    The head is the model's own code and runs on slices; see `blockwise.head`.

    The loss is a sum over predictions, not a mean. `cross_entropy` scores the text: the last token of a window has no
    label and adds nothing. `divergence` scores labels drawn from the model's own distribution, at every prediction; the
    same `seed` draws the same labels however samples are batched and sliced. A model without a head predicts nothing:
    its loss is 1 - cosine of its features with themselves. The curvature of this loss is that of a distribution of
    directions around the features, and the gradient is drawn so that its mean square equals that curvature.

    Everything outside the blocks must be loaded. `forms`: output forms of all blocks, see `Trace`.
    """

    def __init__(
        self,
        model: BlockwiseModel,
        forms: Sequence[Form],
        samples: Tensor,
        *,
        kind: Loss,
        seed: int,
    ) -> None:
        self._samples, self._device, self._seed = samples, model.device, seed
        self._head = Head(model, forms, samples)
        if kind == "cross_entropy" and not self._head.per_token:
            raise ValueError("cross entropy needs labels, and images have none: use divergence")
        self._most = max(1, _SLICE_BYTES // (_BYTES_PER_LOGIT * self._head.classes))
        # One number per prediction, drawn in advance: labels then depend on the logits and on nothing else.
        generator = torch.Generator().manual_seed(seed)
        self._uniform = torch.rand(self._head.predictions, generator=generator) if kind == "divergence" else None

    @property
    def predictions(self) -> int:
        """The number of predictions that the loss sums over, including those without a label."""
        return torch.Size(self._head.predictions).numel()

    def gradient(self, first: int, hidden: Tensor) -> Tensor:
        """d loss / d hidden, with the device, shape and dtype of `hidden`.

        hidden: outputs `[batch, tokens, width]` of the last block for the samples that start at number `first`.
        """
        gradients = torch.zeros_like(hidden)
        scored = hidden.shape[1] - (self._uniform is None)
        for rows, tokens in self._head.parts(len(hidden), scored, self._most):
            states = hidden[rows, tokens].to(self._device)
            samples = slice(first + rows.start, first + rows.stop)
            gradients[rows, tokens] = self._slice_gradient(states, samples, tokens)
        return gradients

    def _slice_gradient(self, states: Tensor, rows: slice, tokens: slice) -> Tensor:
        states = states.detach().requires_grad_()
        with torch.enable_grad():
            values, is_logits = self._head.predict(states, rows, tokens)
        if is_logits:
            # The gradient of cross entropy is explicit, because its first half is also the distribution of the labels.
            slope = values.detach().float().softmax(-1)
            labels = self._labels(slope, rows, tokens)
            slope.scatter_add_(-1, labels, torch.full_like(labels, -1, dtype=slope.dtype))
        else:
            slope = self._turn(values.detach().float(), rows)
        return torch.autograd.grad(values, states, slope.to(values.dtype))[0]

    def _labels(self, probabilities: Tensor, rows: slice, tokens: slice) -> Tensor:
        """int64 `[batch, tokens, 1]`, or `[batch, 1]` for images."""
        if self._uniform is None:
            return self._samples[rows, tokens.start + 1 : tokens.stop + 1].to(self._device).unsqueeze(-1)
        heights = probabilities.cumsum(-1)
        top = heights[..., -1:]
        # Rounding must not reach the top: a label with zero probability would have the largest gradient of all.
        drawn = self._uniform[self._head.place(rows, tokens)].to(self._device).unsqueeze(-1) * top
        return torch.searchsorted(heights, drawn.minimum(top.nextafter(torch.zeros_like(top))), right=True)

    def _turn(self, features: Tensor, rows: slice) -> Tensor:
        """For each of `features`, a random vector orthogonal to it, divided by its length. The mean outer product of
        this vector is the second derivative of 1 - cosine there."""
        generator = torch.Generator().manual_seed(self._seed)
        # Vectors are drawn for all samples, so that batches do not matter.
        drawn = torch.randn((*self._head.predictions, features.shape[-1]), generator=generator)[rows]
        drawn = drawn.to(features.device)
        length = features.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        unit = features / length
        return (drawn - (drawn * unit).sum(-1, keepdim=True) * unit) / length
