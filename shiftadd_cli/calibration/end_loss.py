"""Gradient of the end loss at the output of the last block, by the model's own norm and head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from shiftadd_cli.calibration.head import returning, slices
from shiftadd_cli.source import Structure

Loss = Literal["divergence", "cross_entropy"]

# Logits are held for so many tokens at once that they, their gradient and two float32 copies stay below this.
_SLICE_BYTES = 256 << 20
_BYTES_PER_LOGIT = 16


class EndLoss:
    """The loss of `windows` int64 `[samples, seq_len]` as a function of what the last block gives out.

    Whatever comes after the blocks is the model's code and runs on slices of tokens; see `calibration.head`.

    The loss is a sum over tokens, not a mean. `cross_entropy` scores the text: the last token of a window has no label
    and adds nothing. `divergence` scores labels drawn from the model's own distribution, at every token; the same
    `seed` draws the same labels however windows are batched and sliced.

    Everything outside the blocks must be materialised on `device`.
    """

    def __init__(
        self, model: Any, structure: Structure, windows: Tensor, *, kind: Loss, seed: int, device: torch.device
    ) -> None:
        self._model, self._windows, self._device = model, windows, device
        self._blocks = [model.get_submodule(name) for name in structure.blocks]
        self._tokens = max(1, _SLICE_BYTES // (_BYTES_PER_LOGIT * model.config.get_text_config().vocab_size))
        # One number a token, drawn before any work: labels are then a function of the logits and of nothing else.
        generator = torch.Generator().manual_seed(seed)
        self._uniform = torch.rand(windows.shape, generator=generator) if kind == "divergence" else None

    def gradient(self, first: int, hidden: Tensor, form: Callable[[Tensor], Any]) -> Tensor:
        """d loss / d hidden, in the place, shape and dtype of `hidden`.

        hidden: outputs `[batch, seq_len, width]` of the last block for the windows from number `first` on.
        form: puts hidden states into what a block of this model returns (bare, or the first of a tuple).
        """
        found = torch.zeros_like(hidden)
        scored = hidden.shape[1] - (self._uniform is None)
        for rows, tokens in slices(len(hidden), scored, self._tokens):
            states = hidden[rows, tokens].to(self._device)
            windows = slice(first + rows.start, first + rows.stop)
            found[rows, tokens] = self._of_slice(states, windows, tokens, form)
        return found

    def _of_slice(self, states: Tensor, rows: slice, tokens: slice, form: Callable[[Tensor], Any]) -> Tensor:
        states = states.detach().requires_grad_()
        with torch.enable_grad(), returning(self._blocks, form(states)):
            # The ids only give the stubs' callers their shapes.
            logits = self._model(input_ids=self._windows[rows, tokens].to(self._device), use_cache=False).logits
        # The gradient of cross entropy is written down, since its first half is also what labels are drawn from.
        slope = logits.detach().float().softmax(-1)
        labels = self._labels(slope, rows, tokens)
        slope.scatter_add_(-1, labels, torch.full_like(labels, -1, dtype=slope.dtype))
        return torch.autograd.grad(logits, states, slope.to(logits.dtype))[0]

    def _labels(self, probabilities: Tensor, rows: slice, tokens: slice) -> Tensor:
        """int64 `[batch, tokens, 1]`."""
        if self._uniform is None:
            return self._windows[rows, tokens.start + 1 : tokens.stop + 1].to(self._device).unsqueeze(-1)
        heights = probabilities.cumsum(-1)
        top = heights[..., -1:]
        # Rounding must not reach the top: a label of no probability would have the largest gradient of all.
        drawn = self._uniform[rows, tokens].to(self._device).unsqueeze(-1) * top
        return torch.searchsorted(heights, drawn.minimum(top.nextafter(torch.zeros_like(top))), right=True)
