"""The dependence of the end loss on each token at each linear: the weights of a loss-aware Hessian.

GuidedQuant (Kim et al. 2025, arXiv:2505.07004, section 3): to second order, and without coupling between output
features, an error ΔW of a linear costs Σ_o Σ_t g[t, o]² (x_t·Δw_o)², where g is the gradient of the end loss at the
linear's output. With g² averaged over output features that is the usual objective with the Hessian E[w_t x xᵀ].

The backward pass, like the forward pass, has one block in memory at a time: only hidden states between blocks are
stored, and each block runs again with autograd when its turn comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from math import fsum
from typing import Any

import torch
from torch import Tensor, nn

from shiftadd_cli.blockwise.forward import check_finite
from shiftadd_cli.blockwise.hidden_states import is_whole
from shiftadd_cli.blockwise.model import BlockwiseModel
from shiftadd_cli.blockwise.trace import Trace
from shiftadd_cli.calibration.end_loss import EndLoss, Loss
from shiftadd_cli.device import dtype_name
from shiftadd_cli.errors import NumericalError

# Memory for stored block inputs, unless the caller says otherwise.
MEMORY_BYTES = 1 << 30


@dataclass(frozen=True)
class SquaredGradients:
    """Squared gradients of the end loss, summed over tokens, at the outputs of linears, averaged over output features.

    Attributes:
        tokens: per token, float32 `[samples, tokens]` on the CPU, for the tokens that enter the block; linears of
            experts have no entry, and the entries of other linears in `partial` are meaningless.
        means: their sum, divided by the number of all predictions (tokens of a text, images), whether the linear sees
            them or not. Multiply half of a mean by the number of output features and by the mean squared error of the
            output, over its features and the tokens that the linear sees: to second order, the result is the increase
            of the loss per prediction.
        partial: linears that in some batch do not return an output for each of these tokens, see `is_whole` (the
            experts of a mixture see some of the tokens, in their own order).
    """

    tokens: dict[str, Tensor]
    means: dict[str, float]
    partial: frozenset[str]

    def token_weights(self) -> dict[str, Tensor]:
        """`tokens` divided by their mean, for every linear except experts': float32 `[samples, tokens]`, of mean 1.

        A linear that no gradient reaches, or that does not see all tokens, gets ones.
        """
        return {
            name: torch.ones_like(squares) if name in self.partial else _with_mean_one(squares)
            for name, squares in self.tokens.items()
        }


@dataclass
class _Batch:
    """Batch `number` in progress: `first` is the number of its first sample, `hidden` its input to every block so
    far."""

    number: int
    first: int
    size: int
    hidden: list[Tensor] = field(default_factory=list)


def squared_gradients(
    model: BlockwiseModel,
    samples: Tensor,
    trace: Trace,
    *,
    loss: Loss = "divergence",
    seed: int = 0,
    memory_bytes: int = MEMORY_BYTES,
) -> SquaredGradients:
    """The squared gradients at every linear of the model, per token and on average.

    loss: `cross_entropy` uses the text's own next tokens as labels, as GuidedQuant does. `divergence` draws each
        label from the model's prediction. The expected squared gradient is then the diagonal of the true Fisher
        matrix. This is the curvature of the divergence between the original's predictions and the compressed model's,
        which compression should keep small. It needs no labels, gives no extra weight to text the model finds
        surprising, and does not depend on the one continuation that was written; hence the default.
    seed: for the drawn labels; results depend on it, not on batches.
    memory_bytes: limit for block inputs stored at once, `blocks * tokens * width` values per sample. As many batches
        as fit go through the blocks together, at least one; each such group reads every block twice.

    samples: see `trace_model`; trace: its result for these samples (not changed here). The parts outside the blocks
    must be loaded. The processes of a team share the batches, and all get all results; each needs the hidden states of
    its own batches.

    Raises NumericalError naming the block where a gradient is not finite.
    """
    if trace.hidden.samples != len(samples):
        raise ValueError(f"the trace is of {trace.hidden.samples} samples, not of {len(samples)}")
    team = model.context.team
    entering = team.share(trace.hidden[0].shape[1] if team.first else 0)
    structure = model.structure
    tokens = [entering, *(form.shape[0] for form in trace.forms)]
    # For thousands of experts, these would take more memory than the model.
    dense = [spec for spec in structure.linears if spec.experts is None]
    squares = {spec.name: torch.zeros(len(samples), tokens[spec.block]) for spec in dense}
    totals: dict[str, list[float]] = {spec.name: [] for spec in structure.linears}
    walk = _Walk(model, trace, squares, totals)
    end = EndLoss(model, trace.forms, samples, kind=loss, seed=seed)
    own = team.shards(len(trace.hidden)).own()
    for batches in _groups(trace, own, memory_bytes // len(structure.blocks)):
        walk.forward(batches)
        names = [f"batch {batch.first}" for batch in batches]
        # With a large vocabulary this takes longer than the blocks.
        for batch, _ in zip(batches, model.context.progress(names, "Head gradients"), strict=True):
            gradient = end.gradient(batch.first, batch.hidden.pop())
            _refuse_not_finite(gradient, "the head")
            batch.hidden.append(gradient)
        walk.backward(batches)
    # Tokens of other processes are zeros here, and exact sums do not depend on the order of totals.
    parts = team.exchange(squares)
    gathered, partial = team.gather(totals), team.gather(sorted(walk.partial))
    return SquaredGradients(
        {name: sum((part[name] for part in parts[1:]), parts[0][name]) for name in squares},
        {name: fsum(chain.from_iterable(part[name] for part in gathered)) / end.predictions for name in totals},
        frozenset(chain.from_iterable(partial)),
    )


@dataclass
class _Walk:
    model: BlockwiseModel
    trace: Trace
    squares: dict[str, Tensor]
    # Sums over the tokens of a call.
    totals: dict[str, list[float]]
    # Linears that did not see all tokens of every batch.
    partial: set[str] = field(default_factory=set)

    def forward(self, batches: Sequence[_Batch]) -> None:
        """Append every block's output to the batches' hidden states."""
        for depth, name, block in self.model.blocks("Predictions"):
            with torch.no_grad():
                for batch in batches:
                    output = self.trace.calls[batch.number][depth].run(block, batch.hidden[-1].to(self.model.device))
                    check_finite(output, name)
                    batch.hidden.append(output.cpu())

    def backward(self, batches: Sequence[_Batch]) -> None:
        """Consume the batches' hidden states, the last of which are gradients, block by block; fills `squares`."""
        device = self.model.device
        for depth, name, block in self.model.blocks("Gradients", backward=True):
            for batch in batches:
                gradient = batch.hidden.pop().to(device)
                inputs = batch.hidden.pop().to(device).detach().requires_grad_()
                with torch.enable_grad(), self._watched(depth, batch):
                    output = self.trace.calls[batch.number][depth].run(block, inputs)
                gradient = torch.autograd.grad(output, inputs, gradient)[0]
                _refuse_not_finite(gradient, name)
                batch.hidden.append(gradient.cpu())

    def _watched(self, depth: int, batch: _Batch) -> ExitStack:
        """Add the squared gradient at each linear's output to `squares` as it is computed; no gradient is stored."""
        model, structure, stack = self.model.skeleton, self.model.structure, ExitStack()
        for spec in structure.linears:
            if spec.block == depth:
                squares = self.squares.get(spec.name)
                watch = self._watch(spec.name, None if squares is None else squares[batch.first :][: batch.size])
                stack.enter_context(model.get_submodule(spec.name).register_forward_hook(watch))
            for block, kind in spec.copies:
                if block == depth:
                    copy = model.get_submodule(structure.blocks[block]).get_submodule(kind)
                    stack.enter_context(copy.register_forward_hook(self._watch(spec.name, None)))
        return stack

    def _watch(self, name: str, rows: Tensor | None) -> Callable[[nn.Module, Any, Tensor], None]:
        """rows: the squares of the batch's tokens; None for a linear of an expert, and for a copy."""

        def add(gradient: Tensor) -> None:
            means = gradient.float().square().mean(-1)
            self.totals[name].append(float(means.sum(dtype=torch.float64)))
            if rows is not None and is_whole(means.shape, *rows.shape):
                rows.add_(means.view(rows.shape).cpu())

        def watch(_: nn.Module, __: Any, output: Tensor) -> None:
            if name not in self.squares or (rows is not None and not is_whole(output.shape[:-1], *rows.shape)):
                self.partial.add(name)
            if output.requires_grad:
                # The hook is on the tensor, not on the module: a model may add to the output in place afterwards.
                output.register_hook(add)

        return watch


def _groups(trace: Trace, numbers: Iterable[int], memory_bytes: int) -> Iterator[list[_Batch]]:
    """Successive batches, in groups whose hidden states at one depth fit into `memory_bytes`."""
    group: list[_Batch] = []
    used = 0
    for number in numbers:
        hidden = trace.hidden[number]
        if group and used + hidden.nbytes > memory_bytes:
            yield group
            group, used = [], 0
        group.append(_Batch(number, trace.hidden.span(number).start, len(hidden), [hidden]))
        used += hidden.nbytes
    if group:
        yield group


def _refuse_not_finite(gradient: Tensor, where: str) -> None:
    if not torch.isfinite(gradient).all():
        dtype = dtype_name(gradient.dtype)
        raise NumericalError(f"The gradient at the input of {where} is not finite in {dtype}; use `dtype=float32`.")


def _with_mean_one(squares: Tensor) -> Tensor:
    mean = squares.double().mean()
    return squares / mean if mean > 0 else torch.ones_like(squares)
