"""Tune row scales, norms and biases of a compressed model to match the predictions of the original.

The solver and block reconstruction see only one block at a time. They cannot tell how its errors add up with those of
other blocks, or which of them reach the predictions. So at the end, the continuous parameters that cost no bits are
tuned in all blocks at once, by the gradient of KL(original || compressed) on the calibration samples. This is
end-to-end training of quantization parameters (EfficientQAT, Chen et al. 2024, arXiv:2407.11062, section 3.3) with the
original's predictions as labels (knowledge distillation, Hinton et al. 2015, arXiv:1503.02531). Some of the samples are
held out, and the result is kept only if it is better there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from shiftadd_cli.blockwise.hidden_states import HiddenStates, batch_span
from shiftadd_cli.distillation.end import EndGap
from shiftadd_cli.distillation.stack import Stack
from shiftadd_cli.errors import NumericalError
from shiftadd_cli.progress import BlockProgress, silent
from shiftadd_cli.reconstruction.optimizer import hold_back, rising_and_falling

# Initial step size of a typical number, relative to its magnitude.
_RATE = 0.005


@dataclass(frozen=True)
class Distillation:
    """The result: tensors of the artifact by name, empty if it was not kept; mean divergence of the predictions for the
    held-out samples, before and after, in nats. It is infinite if tuning produced non-finite values."""

    tensors: dict[str, Tensor]
    divergence_before: float
    divergence_after: float

    @property
    def kept(self) -> bool:
        return bool(self.tensors)


@dataclass(frozen=True)
class Distiller:
    """A compressed model, `stack` and `end`, and the original's hidden states after its last block, `targets`.

    first_input: returns the input of the first block for a span of samples.
    """

    stack: Stack
    end: EndGap
    first_input: Callable[[slice], Tensor]
    targets: HiddenStates
    batch_size: int

    def run(
        self,
        *,
        epochs: int,
        seed: int,
        progress: BlockProgress = silent,
        after_step: Callable[[], object] = lambda: None,
    ) -> Distillation:
        """Tune the model; `epochs` are passes over the samples that are not held out. Needs at least two batches.

        after_step: called after every step, so that other processes know that this one is alive.

        Raises NumericalError if the output of a block is not finite before tuning.
        """
        train, held_back = hold_back(len(self.targets))
        before = self.divergence(held_back)
        try:
            self._descend(train, epochs, seed, progress, after_step)
            after = self.divergence(held_back)
        except NumericalError:
            # The untuned model is unaffected, so the run continues with it.
            after = inf
        return Distillation(self._tensors() if after < before else {}, before, after)

    def _descend(
        self,
        train: Sequence[int],
        epochs: int,
        seed: int,
        progress: BlockProgress,
        after_step: Callable[[], object],
    ) -> None:
        optimizer = torch.optim.Adam(self._groups(), betas=(0.9, 0.95))
        schedule = LambdaLR(optimizer, rising_and_falling(epochs * len(train)))
        generator = torch.Generator().manual_seed(seed)
        order = [index for _ in range(epochs) for index in torch.randperm(len(train), generator=generator).tolist()]
        names = [f"step {number}" for number in range(1, len(order) + 1)]
        for index, _ in zip(order, progress(names, "Distilling"), strict=True):
            self._learn(train[index])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            after_step()

    def divergence(self, batches: Sequence[int]) -> float:
        """Mean divergence over the predictions of these batches, in nats."""
        total, predictions = 0.0, 0
        for index in batches:
            output = self.stack.forward(index, self.first_input(self._span(index)))[-1]
            gap = self.end.gap(self._span(index).start, output, self.targets[index], learn=False)
            total += gap.divergence
            predictions += gap.predictions
        return total / predictions

    def _learn(self, index: int) -> None:
        """Accumulate the gradients of all tunable parameters on one batch."""
        inputs = self.stack.forward(index, self.first_input(self._span(index)))
        gap = self.end.gap(self._span(index).start, inputs.pop(), self.targets[index], learn=True)
        self.stack.backward(index, inputs, gap.gradient)

    def _span(self, index: int) -> slice:
        return batch_span(index, self.batch_size, self.targets.samples)

    def _groups(self) -> list[dict[str, object]]:
        parameters: list[nn.Parameter] = list(self.end.vectors.free.values())
        for block in self.stack.blocks:
            parameters += block.parameters()
        return [
            {"params": [parameter], "lr": _RATE * float(parameter.detach().abs().mean().clamp_min(1e-12))}
            for parameter in parameters
        ]

    def _tensors(self) -> dict[str, Tensor]:
        tensors = self.end.vectors.stored()
        for block in self.stack.blocks:
            tensors |= block.tensors()
        return tensors
