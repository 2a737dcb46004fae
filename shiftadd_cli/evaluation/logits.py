"""Logits of a decoder a few rows at a time, since all of a batch would not fit beside the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shiftadd_cli.device import dtype_name
from shiftadd_cli.errors import NumericalError

# Where a whole window of logits has to be held, batches are cut to this size (one window at least).
FULL_LOGITS_BYTES = 256 << 20

_PROBE_TOKENS = 32


class RowLogits:
    """Computes, for a batch of windows, the logits that predict the tokens of each.

    Where the output layer is a plain linear over the last hidden states, only these are kept and the layer runs on
    rows as they are asked for; where the model does more to its logits (soft caps, factors), its own forward is used
    and all logits of the batch are held.
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
        """Windows of `context` tokens to run at once at most; None if memory does not depend on it much."""
        if self._head is not None:
            return None
        itemsize = max(4, self._model.dtype.itemsize)
        return max(1, FULL_LOGITS_BYTES // (context * self.vocab_size * itemsize))

    def check(self, windows: Tensor) -> None:
        """Find out, on the first tokens of `windows` (`[any, n]`), whether body and head can be run apart."""
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
            whole = self._model(input_ids=probe, use_cache=False).logits
            states = getattr(body(input_ids=probe, use_cache=False), "last_hidden_state", None)
            # Equal to the last bit: the same operations ran, and any factor or cap would show.
            if states is not None and torch.equal(head(states).float(), whole.float()):
                self._head = head

    def states(self, windows: Tensor, unscored: int = 1) -> Tensor:
        """For windows `[w, n]`: `[w * (n - unscored), width]`, to be given to `logits` in pieces.

        unscored: tokens at the start of each window that are not predicted, at least 1.
        """
        ids = windows.to(self.device)
        if self._head is None:
            found = self._model(input_ids=ids, use_cache=False).logits
        else:
            found = self._model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return found[:, unscored - 1 : -1].reshape(-1, found.shape[-1])

    def logits(self, states: Tensor) -> Tensor:
        """Rows of `states` to float32 logits `[rows, vocabulary]`."""
        rows = states if self._head is None else self._head(states)
        return rows.float()

    def refuse_not_finite(self, values: Tensor, what: str) -> None:
        """Raise NumericalError unless all `values` are finite."""
        if not torch.isfinite(values).all():
            raise NumericalError(
                f"{self.name} gives a {what} that is not finite in {dtype_name(self._model.dtype)}; "
                "try `dtype=float32`, and if that does not help the checkpoint is damaged."
            )
