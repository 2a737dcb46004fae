"""Tune a quantized block by gradient descent so that its output on calibration text matches the original's.

Layer-wise solvers minimise the output error of each linear by itself. The error that matters is that of the block
output, where the errors of the linears can compensate for each other. So scales, offsets, codes, norms and biases are
tuned together, through the block (BRECQ, arXiv:2102.05426; for the codes of language models AutoRound,
arXiv:2309.05516). This needs only unlabelled text. Some of the text is held out, and the tuned values are kept only if
they are better there.
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

# Initial step sizes, which decay linearly to zero: in level spacings, and relative to the mean magnitude.
_LATENT_RATE = 0.01
_SCALE_RATE = 0.003


@dataclass(frozen=True)
class Reconstruction:
    """The result: compressed weights by path in the block and other parameters by name, both empty if it was not kept;
    relative errors of the block's output on the held-out text, before and after."""

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

    stream: the block, computing with the decoded weights, and its input hidden states; targets: the output of the
    original block for the same windows. originals: float32 `[out, in]`, the matrices that `weights` approximate.
    transposed: linears whose module stores `[in, out]`. epochs: passes over the text that is not held out.
    fixed: vectors of the block that are not tuned, by path.

    The block's parameters are not changed. Needs at least two batches.
    """
    tuning = _Tuning(stream, targets, weights, originals, set(transposed), fixed)
    train, held_back = hold_back(len(stream.hidden))
    before = tuning.error(held_back)
    tuning.descend(train, epochs, seed)
    after = tuning.error(held_back)
    if not after < before:
        return Reconstruction({}, {}, before, after)
    vectors = {name: vector.detach().to(tuning.dtypes[name]) for name, vector in tuning.vectors.items()}
    return Reconstruction({kind: weight.quantized() for kind, weight in tuning.weights.items()}, vectors, before, after)


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
        self.weights = {kind: TunableWeight(weight, originals[kind]) for kind, weight in weights.items()}
        named = dict(stream.block.named_parameters())
        self.dtypes = {name: parameter.dtype for name, parameter in named.items()}
        self.vectors = {
            name: nn.Parameter(parameter.detach().float().clone())
            for name, parameter in named.items()
            if parameter.ndim == 1 and parameter.is_floating_point() and name not in fixed
        }

    def descend(self, batches: Sequence[int], epochs: int, seed: int) -> None:
        """Train on the batches, in a new random order in every epoch."""
        optimizers = [*self._latent_optimizers(), self._scale_optimizer()]
        schedules = [LambdaLR(optimizer, rising_and_falling(epochs * len(batches))) for optimizer in optimizers]
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
        """Mean loss over the batches."""
        parameters = self._parameters()
        return sum(float(self._loss(index, parameters)) for index in batches) / len(batches)

    def _loss(self, index: int, parameters: Mapping[str, Tensor]) -> Tensor:
        """Mean over tokens of ‖y − ŷ‖² / ‖y‖². Later layers normalise their input, so a token whose hidden state is a
        hundred times larger, as for first tokens, must not count ten thousand times."""
        target = self.targets[index].to(self.stream.device).float()
        difference = self._output(index, parameters).float() - target
        return (difference.square().sum(-1) / target.square().sum(-1).clamp_min(1e-30)).mean()

    def _output(self, index: int, parameters: Mapping[str, Tensor]) -> Tensor:
        batch = self.stream.hidden[index].to(self.stream.device)
        call = self.stream.calls[index]
        return call.run(lambda *args, **named: functional_call(self.stream.block, dict(parameters), args, named), batch)

    def _parameters(self) -> dict[str, Tensor]:
        """The tuned values as the block's own parameters, by name."""
        parameters: dict[str, Tensor] = {name: vector.to(self.dtypes[name]) for name, vector in self.vectors.items()}
        for kind, weight in self.weights.items():
            name = f"{kind}.weight"
            matrix = weight().to(self.dtypes[name])
            parameters[name] = matrix.T if kind in self.transposed else matrix
        return parameters

    def _latent_optimizers(self) -> list[torch.optim.Optimizer]:
        groups: list[dict[str, object]] = [
            {"params": [weight.latent], "lr": _LATENT_RATE * weight.level_spacing()}
            for weight in self.weights.values()
            if weight.latent is not None
        ]
        return [FactoredDescent(groups)] if groups else []

    def _scale_optimizer(self) -> torch.optim.Adam:
        parameters: list[nn.Parameter] = list(self.vectors.values())
        for weight in self.weights.values():
            parameters += [
                parameter
                for name, parameter in weight.named_parameters()
                if name != "latent" and parameter.requires_grad
            ]
        groups = [
            {"params": [parameter], "lr": _SCALE_RATE * float(parameter.detach().abs().mean().clamp_min(1e-12))}
            for parameter in parameters
        ]
        return torch.optim.Adam(groups, betas=(0.9, 0.95))
