"""The second moment of what an output head, a classifier or a patch embedding reads in the original model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from shiftadd_cli.blockwise.block_runner import BlockStream
from shiftadd_cli.blockwise.forward import StopForward, hooked, run_model
from shiftadd_cli.blockwise.head import Head
from shiftadd_cli.blockwise.model import BlockwiseModel
from shiftadd_cli.blockwise.passage import Passage
from shiftadd_cli.blockwise.trace import trace_model
from shiftadd_cli.calibration.hessian import MomentSum, sufficient_tokens


def table_moment(
    model: BlockwiseModel, samples: Tensor, batch_size: int, name: str, passage: Passage | None = None
) -> Tensor | None:
    """E[x xᵀ], float32 `[columns, columns]` on the CPU, of what the head or the convolution `name` reads.

    A convolution reads patches. None for a convolution whose patches are not those of torch's `unfold` (in groups, or
    with padding other than zeros). The parts outside the blocks must be loaded. The processes of a team share the
    samples, and all get the moment. passage: see `trace_model`.
    """
    module = model.skeleton.get_submodule(name)
    if isinstance(module, nn.Conv2d):
        return _patch_moment(model, samples, batch_size, name) if _unfolds(module) else None
    return _head_moment(model, samples, batch_size, name, passage)


def _head_moment(model: BlockwiseModel, samples: Tensor, batch_size: int, name: str, passage: Passage | None) -> Tensor:
    columns = model.skeleton.get_submodule(name).weight.shape[1]
    inputs = len(samples) if model.source.reads_images else samples.numel()
    # A moment of all windows would take as long as a walk through the blocks with all of them, and is hardly better.
    samples = samples[:: max(1, inputs // sufficient_tokens(columns))]
    trace, team = trace_model(model, samples, batch_size, passage=passage), model.context.team
    for depth, block_name, block in model.blocks("Inputs of the head"):
        calls = trace.calls_of(depth)
        BlockStream(block_name, block, trace.hidden, calls, model.context).advance()
    head, moments = Head(model, trace.forms, samples), MomentSum(columns, model.device, cross=False)
    for shards, batches in team.shards(len(trace.hidden)).rounds():
        for index in batches:
            hidden = trace.hidden[index].to(model.device)
            span = trace.hidden.span(index), slice(0, hidden.shape[1])
            moments.add(_input_of(model, name, partial(head.predict, hidden, *span)), None, None)
        moments.end_round(team, len(shards))
    return moments.mean(team).hessian.cpu()


def _patch_moment(model: BlockwiseModel, samples: Tensor, batch_size: int, name: str) -> Tensor:
    module = model.skeleton.get_submodule(name)
    columns, team = module.weight[0].numel(), model.context.team
    moments, batches = MomentSum(columns, model.device, cross=False), samples.split(batch_size)
    for shards, indices in team.shards(len(batches)).rounds():
        for index in indices:
            batch = batches[index].to(model.device)
            pixels = _input_of(model, name, partial(run_model, model.skeleton, batch))
            patches = unfold(pixels.float(), module.kernel_size, module.dilation, module.padding, module.stride)
            moments.add(patches.transpose(1, 2), None, None)
        moments.end_round(team, len(shards))
    return moments.mean(team).hessian.cpu()


def _input_of(model: BlockwiseModel, name: str, run: Callable[[], object]) -> Tensor:
    """The input of the module `name` when `run` is called, which stops there."""
    seen: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0].detach())
        raise StopForward

    handle = model.skeleton.get_submodule(name).register_forward_pre_hook(stop)
    with hooked([handle]), suppress(StopForward), torch.no_grad():
        run()
    return seen[0]


def _unfolds(module: nn.Conv2d) -> bool:
    return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
