"""Windows that run through parts of a model again and again, block by block, up to its predictions.

All in float32, whatever the model's dtype: what replacing one linear does to the predictions is less than what rounding
to 16 bits does to them. Measured on SmolLM2-135M, 512 tokens: noise of 0.3% on one matrix moves the predictions by
5e-7 nats a token in float32 and by 1.4e-3 in bfloat16, where noise of 10% should move them by 6e-4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shiftadd_cli.calibration.distribution import Reference
from shiftadd_cli.calibration.head import dress, returning, slices
from shiftadd_cli.calibration.trace import trace_model
from shiftadd_cli.device import move_parts
from shiftadd_cli.progress import BlockProgress
from shiftadd_cli.source import Source, Structure

# Logits, their logarithms, the original's and two differences, float32, are held for so many tokens at once.
_SLICE_BYTES = 128 << 20
_BYTES_PER_LOGIT = 20


class Replay:
    """A float32 copy of a model, loaded block by block, and the windows that run through it.

    hidden: their states at the input of the first block, float32 `[windows, seq_len, width]` on the CPU. All hidden
    states here are of that form.
    """

    def __init__(
        self, source: Source, structure: Structure, windows: Tensor, batch_size: int, device: torch.device
    ) -> None:
        """windows: int64 `[windows, seq_len]`; batch_size: how many of them run at once.

        What lies outside the blocks is loaded now and stays as long as this does, beside what `source` has in memory.
        """
        self._source = source.at(torch.float32)
        self._structure, self._windows, self._device = structure, windows, device
        self._batch_size = batch_size
        self._model: Any = self._source.skeleton()
        self._blocks = [self._model.get_submodule(name) for name in structure.blocks]
        self._dress: Callable[[Tensor], Any] = dress(None)
        self._source.materialise(structure.outside)
        move_parts(self._model, structure.outside, device)
        trace = trace_model(self._source, structure, windows, batch_size, device)
        self._calls = trace.calls
        self.hidden = torch.cat(list(trace.hidden))

    def load(self, depth: int) -> nn.Module:
        """Block number `depth`, in memory on the device until it is released; its weights may be changed until then."""
        self._source.materialise([self._structure.blocks[depth]])
        return self._blocks[depth].to(self._device)

    def release(self, depth: int) -> None:
        self._source.release([self._structure.blocks[depth]])

    @torch.no_grad()
    def run(self, depth: int, hidden: Tensor) -> Tensor:
        """What block number `depth`, which must be loaded, makes of hidden states."""
        block, found = self._blocks[depth], []
        with block.register_forward_hook(lambda _, __, output: self._learn_form(output)):
            for batch in hidden.split(self._batch_size):
                found.append(self._calls[len(batch)][depth].run(block, batch.to(self._device)).cpu())
        return torch.cat(found)

    @torch.no_grad()
    def divergences(
        self, original: Tensor, others: Sequence[Tensor], progress: BlockProgress = lambda names, _: names
    ) -> list[float]:
        """Mean over tokens of KL(original || other), in nats, of the predictions made from outputs of the last block.

        Logits exist for some tokens of one model at a time, beside the original's for the same tokens. No mean is
        negative: what rounding leaves below zero is zero. A mean may be infinite or not a number.
        """
        totals = [0.0] * len(others)
        vocabulary: int = self._model.config.get_text_config().vocab_size
        most = max(1, _SLICE_BYTES // (_BYTES_PER_LOGIT * vocabulary))
        parts = list(slices(original.shape[0], original.shape[1], most))
        names = [f"part {number}" for number in range(len(parts))]
        for _, (rows, tokens) in zip(progress(names, "Comparing"), parts, strict=True):
            reference = Reference(self._chances(original, rows, tokens))
            for index, other in enumerate(others):
                gaps = reference.divergence(self._chances(other, rows, tokens))
                totals[index] += float(gaps.sum(dtype=torch.float64))
        return [total / self._windows.numel() if not total < 0 else 0.0 for total in totals]

    def _chances(self, hidden: Tensor, rows: slice, tokens: slice) -> Tensor:
        """Log-probabilities float32 `[windows, tokens, vocabulary]`."""
        states = self._dress(hidden[rows, tokens].to(self._device))
        with returning(self._blocks, states):
            # The ids only give the stubs' callers their shapes.
            ids = self._windows[rows, tokens].to(self._device)
            logits: Tensor = self._model(input_ids=ids, use_cache=False).logits
        return logits.float().log_softmax(-1)

    def _learn_form(self, output: Any) -> None:
        self._dress = dress(output)
