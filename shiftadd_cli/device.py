"""Choice of the device, and its capabilities."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING

from shiftadd_cli.distributed.launch import local_rank
from shiftadd_cli.errors import RecipeError

if TYPE_CHECKING:
    import torch
    from torch import nn


def choose_device(name: str) -> torch.device:
    """The torch device called `name`. `auto` is a CUDA device if there is one, else the CPU. A process that torchrun
    started takes the CUDA device of its local rank; any other process takes the first.

    Raises RecipeError for a name torch does not know or a device this machine does not have.
    """
    import torch

    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RecipeError(f"`device` {name} is not available on this machine; use `device=cpu`.") from error
    return device


def computes_in(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device has matrix product instructions for this floating dtype. A CPU without them converts 16-bit
    numbers for every product, which is slower than computing in float32."""
    if device.type != "cpu" or dtype.itemsize != 2:
        return True
    import torch

    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype as users write it: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def use_threads(count: int | None) -> int:
    """Set the number of CPU threads of torch to `count`, or leave it for None; returns the number in use."""
    import torch

    if count is not None:
        torch.set_num_threads(count)
    return torch.get_num_threads()


def move_parts(model: nn.Module, names: Iterable[str], device: torch.device) -> None:
    """Move modules, or individual parameters and buffers, to the device by name."""
    modules = dict(model.named_modules())
    for name in names:
        if name in modules:
            modules[name].to(device)
        else:
            tensor = operator.attrgetter(name)(model)
            tensor.data = tensor.data.to(device)
