"""Where to compute."""

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
    """The torch device called `name`; `auto` is a CUDA device if there is one, else the CPU: the first, or of a process
    that torchrun started the one of its number.

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
    """Whether the device has instructions for products of numbers of this floating type; a CPU without them converts
    16-bit ones all the time, which takes longer than 32-bit ones take."""
    if device.type != "cpu" or dtype.itemsize != 2:
        return True
    import torch

    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype as a user writes it: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def use_threads(count: int | None) -> int:
    """Let torch compute with `count` threads of the CPU, or for None with as many as it does now; says how many."""
    import torch

    if count is not None:
        torch.set_num_threads(count)
    return torch.get_num_threads()


def move_parts(model: nn.Module, names: Iterable[str], device: torch.device) -> None:
    """Move modules, or parameters and buffers that stand by themselves, to the device."""
    modules = dict(model.named_modules())
    for name in names:
        if name in modules:
            modules[name].to(device)
        else:
            tensor = operator.attrgetter(name)(model)
            tensor.data = tensor.data.to(device)
