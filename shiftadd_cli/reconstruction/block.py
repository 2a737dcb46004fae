"""Tune a quantized block until its output is as near to the original's as calibration text can make it.

Layer-wise solvers minimise each linear's own output error. What leaves the block is what counts, and the errors of its
linears can make up for each other there: scales, offsets, codes, norms and biases are tuned together, through the
block, by gradient (BRECQ, arXiv:2102.05426; for the codes of language models AutoRound, arXiv:2309.05516). Text without
labels is all it takes. Some of the text is held back, and a block keeps what was tuned only if it is better there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.lr_scheduler import LambdaLR

from shiftadd_cli.bcq.weight import QuantizedWeight
from shiftadd_cli.blockwise.block_runner import BlockStream
from shiftadd_cli.blockwise.hidden_states import HiddenStates
from shiftadd_cli.reconstruction.optimizer import FactoredDescent, hold_back, rising_and_falling
from shiftadd_cli.reconstruction.weight import TunableWeight

# Distances per step at the start; they fall to nothing linearly. In level spacings, and relative to the mean size.
_LATENT_RATE = 0.01
_SCALE_RATE = 0.003


@dataclass(frozen=True)
class Reconstruction:
    """What came of it: compressed weights by path in the block, other parameters by name, both empty if it was not
    kept; relative errors of the block's output on the text held back, before and after."""

    weights: dict[str, QuantizedWeight]
    parameters: dict[str, Tensor]
    error_before: float
    error_after: float

    @property
    def kept(self) -> bool:
        return bool(self.weights)


def reconstruct_block(
    stream: BlockStream,
    targets: HiddenStates,
    weights: Mapping[str, QuantizedWeight],
    originals: Mapping[str, Tensor],
    transposed: Sequence[str],
    *,
    epochs: int,
    seed: int,
    fixed: Collection[str] = (),
) -> Reconstruction:
    """Tune the linears `weights` (by path in the block) and all vectors among the block's other parameters.

    stream: the block, computing with the decoded weights, and the hidden states that reach it; targets: what the
    original block gives for the same windows. originals: float32 `[out, in]`, the matrices that `weights` stand for.
    transposed: those whose module stores `[in, out]`. epochs: passes over the text that is not held back.
    fixed: vectors of the block that are not tuned, by path.

    The block's parameters are left as they are. Needs two batches at least.
    """
    tuning = _Tuning(stream, targets, weights, originals, set(transposed), fixed)
    train, held_back = hold_back(len(stream.hidden))
    before = tuning.error(held_back)
    tuning.descend(train, epochs, seed)
    after = tuning.error(held_back)
    if not after < before:
        return Reconstruction({}, {}, before, after)
    vectors = {name: each.detach().to(tuning.dtypes[name]) for name, each in tuning.vectors.items()}
    return Reconstruction({kind: each.quantized() for kind, each in tuning.weights.items()}, vectors, before, after)


class _Tuning:
    def __init__(
        self,
        stream: BlockStream,
        targets: HiddenStates,
        weights: Mapping[str, QuantizedWeight],
        originals: Mapping[str, Tensor],
        transposed: set[str],
        fixed: Collection[str],
    ) -> None:
        self.stream, self.targets, self.transposed = stream, targets, transposed
        self.weights = {kind: TunableWeight(each, originals[kind]) for kind, each in weights.items()}
        named = dict(stream.block.named_parameters())
        self.dtypes = {name: each.dtype for name, each in named.items()}
        self.vectors = {
            name: nn.Parameter(each.detach().float().clone())
            for name, each in named.items()
            if each.ndim == 1 and each.is_floating_point() and name not in fixed
        }

    def descend(self, batches: Sequence[int], epochs: int, seed: int) -> None:
        """Go through the batches, in another order each time."""
        optimizers: list[torch.optim.Optimizer] = [self._latent_optimizer(), self._scale_optimizer()]
        schedules = [LambdaLR(each, rising_and_falling(epochs * len(batches))) for each in optimizers]
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            for index in torch.randperm(len(batches), generator=generator).tolist():
                with torch.enable_grad():
                    self._loss(batches[index], self._parameters()).backward()
                for optimizer, schedule in zip(optimizers, schedules, strict=True):
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()

    @torch.no_grad()
    def error(self, batches: Sequence[int]) -> float:
        """Mean of the loss."""
        parameters = self._parameters()
        return sum(float(self._loss(index, parameters)) for index in batches) / len(batches)

    def _loss(self, index: int, parameters: Mapping[str, Tensor]) -> Tensor:
        """Mean over tokens of ‖y − ŷ‖² / ‖y‖²: what reads the output normalises it first, so a token whose hidden
        state is a hundred times larger, as first tokens are, must not count ten thousand times."""
        target = self.targets[index].to(self.stream.device).float()
        difference = self._output(index, parameters).float() - target
        return (difference.square().sum(-1) / target.square().sum(-1).clamp_min(1e-30)).mean()

    def _output(self, index: int, parameters: Mapping[str, Tensor]) -> Tensor:
        batch = self.stream.hidden[index].to(self.stream.device)
        call = self.stream.calls[index]
        return call.run(lambda *args, **named: functional_call(self.stream.block, dict(parameters), args, named), batch)

    def _parameters(self) -> dict[str, Tensor]:
        """What is tuned, as the block's own parameters by name."""
        parameters: dict[str, Tensor] = {name: each.to(self.dtypes[name]) for name, each in self.vectors.items()}
        for kind, weight in self.weights.items():
            name = f"{kind}.weight"
            matrix = weight().to(self.dtypes[name])
            parameters[name] = matrix.T if kind in self.transposed else matrix
        return parameters

    def _latent_optimizer(self) -> FactoredDescent:
        return FactoredDescent(
            {"params": [each.latent], "lr": _LATENT_RATE * each.level_spacing()} for each in self.weights.values()
        )

    def _scale_optimizer(self) -> torch.optim.Adam:
        parameters: list[nn.Parameter] = list(self.vectors.values())
        for weight in self.weights.values():
            parameters += [each for name, each in weight.named_parameters() if name != "latent" and each.requires_grad]
        groups = [
            {"params": [each], "lr": _SCALE_RATE * float(each.detach().abs().mean().clamp_min(1e-12))}
            for each in parameters
        ]
        return torch.optim.Adam(groups, betas=(0.9, 0.95))
