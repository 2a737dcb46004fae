"""The last step of a run: load the checkpoint as a user would, and compare its predictions with its decoded tensors."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from shiftadd_cli.blockwise.distribution import relative_difference, rounding_of
from shiftadd_cli.blockwise.forward import predict
from shiftadd_cli.errors import NumericalError
from shiftadd_cli.progress import no_library_bar
from shiftadd_cli.runtime.load import load


def check_checkpoint(folder: Path, sample: Tensor, expected: Tensor, *, remote_code: bool = False) -> float:
    """Load the checkpoint in `folder` and run one sample through it; returns the relative difference from `expected`.

    sample: int64 `[1, tokens]`, or pixels `[1, channels, height, width]`. expected: predictions for it, `[1, ...,
    classes]`, from the decoded stored tensors, block by block. remote_code: run the code that comes with the model.

    Raises NumericalError if the predictions are not finite, or differ from `expected` by more than rounding.
    """
    with no_library_bar():
        model = load(folder, **({"trust_remote_code": True} if remote_code else {}))
    with torch.no_grad():
        values = predict(model, sample).values
    if not torch.isfinite(values).all():
        raise NumericalError(
            f"The compressed {type(model).__name__} gives predictions that are not finite when it is loaded; nothing "
            "was written."
        )
    share = relative_difference(values, expected)
    if not share <= rounding_of(model.dtype):
        raise NumericalError(
            f"The compressed {type(model).__name__} predicts something else when it is loaded than with its decoded "
            f"weights (a difference of {share:.0%}); its architecture is not supported, and nothing was written."
        )
    return share
