"""Where to compute."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shiftadd_cli.errors import RecipeError

if TYPE_CHECKING:
    import torch


def choose_device(name: str) -> torch.device:
    """The torch device called `name`; `auto` is the first CUDA device if there is one, else the CPU.

    Raises RecipeError for a name torch does not know or a device this machine does not have.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RecipeError(f"--device {name} is not available on this machine; use --device cpu.") from error
    return device
