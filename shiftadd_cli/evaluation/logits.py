"""Logits of a decoder, computed a few rows at a time: those of a full batch would not fit next to the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shiftadd_cli.device import dtype_name
from shiftadd_cli.errors import NumericalError

# If logits have to be kept for full windows, batches are limited to this size (but at least one window).
FULL_LOGITS_BYTES = 256 << 20

_PROBE_TOKENS = 32


class RowLogits:
    """Computes the logits that predict the tokens of a batch of windows.

    If the head is a plain linear layer over the last hidden states, only these states are kept, and the head runs on
    rows on demand. If the model does more to its logits (soft caps, factors), its own forward pass is used and all
    logits of the batch are kept.
    """

    def __init__(self, model: Any, name: str) -> None:
        self.name = name
        self._model = model
        self._head: nn.Module | None = None
        self._checked = False
        text = model.config.get_text_config()
        self.vocab_size: int = text.vocab_size

    @property
    def device(self) -> torch.device:
        device: torch.device = self._model.device
        return device

    def max_windows(self, context: int) -> int | None:
        """The maximum batch size for windows of `context` tokens; None if memory hardly depends on it."""
        if self._head is not None:
            return None
        itemsize = max(4, self._model.dtype.itemsize)
        return max(1, FULL_LOGITS_BYTES // (context * self.vocab_size * itemsize))

    def check(self, windows: Tensor) -> None:
        """Determine, on the first tokens of `windows` (`[any, n]`), whether body and head can run separately."""
        if self._checked:
            return
        self._checked = True
        head = self._model.get_output_embeddings()
        body = self._model.base_model
        caps = getattr(self._model.config.get_text_config(), "final_logit_softcapping", None)
        if not isinstance(head, nn.Linear) or body is self._model or caps:
            return
        probe = windows[:1, :_PROBE_TOKENS].to(self.device)
        with torch.inference_mode():
            expected = self._model(input_ids=probe, use_cache=False).logits
            states = getattr(body(input_ids=probe, use_cache=False), "last_hidden_state", None)
            # Bitwise equality: the operations are the same, and any factor or cap would show.
            if states is not None and torch.equal(head(states).float(), expected.float()):
                self._head = head

    def states(self, windows: Tensor, unscored: int = 1) -> Tensor:
        """States of windows `[w, n]`: `[w * (n - unscored), width]`, to be passed to `logits` in pieces.

        unscored: tokens at the start of each window that are not predicted, at least 1.
        """
        ids = windows.to(self.device)
        if self._head is None:
            states = self._model(input_ids=ids, use_cache=False).logits
        else:
            states = self._model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return states[:, unscored - 1 : -1].reshape(-1, states.shape[-1])

    def logits(self, states: Tensor) -> Tensor:
        """Float32 logits `[rows, vocabulary]` from rows of `states`."""
        rows = states if self._head is None else self._head(states)
        return rows.float()

    def refuse_not_finite(self, values: Tensor, what: str) -> None:
        """Raise NumericalError unless all `values` are finite."""
        if not torch.isfinite(values).all():
            raise NumericalError(
                f"{self.name} gives a {what} that is not finite in {dtype_name(self._model.dtype)}; "
                "try `dtype=float32`. If that does not help, the checkpoint is damaged."
            )
