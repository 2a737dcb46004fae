"""The last step of a run: the checkpoint is loaded as a user would, and must predict what its tensors stand for."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from shiftadd_cli.calibration.forward import predict
from shiftadd_cli.errors import NumericalError
from shiftadd_cli.progress import no_library_bar
from shiftadd_cli.runtime.load import load

# Relative difference of predictions, by what the model computes in. The kernels add in another order, and the reference
# may be computed in float32 where the model is in 16 bits. Faults of loading show as differences of the order of 1.
_ROUNDING = {torch.float32: 0.02, torch.float16: 0.1, torch.bfloat16: 0.2}
# Predictions that are in float32 at a time.
_SLICE = 64


def check_checkpoint(folder: Path, sample: Tensor, expected: Tensor, *, remote_code: bool = False) -> float:
    """Load the checkpoint in `folder` and run one sample through it; the relative difference from `expected`.

    sample: int64 `[1, tokens]`, or pixels `[1, channels, height, width]`. expected: predictions for it, `[1, ...,
    classes]`, from the stored tensors decoded, block by block. remote_code: run the code that the model brings.

    Raises NumericalError where the predictions are not finite, or other than `expected` by more than rounding.
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
    difference = scale = 0.0
    for own, other in zip(values.flatten(0, -2).split(_SLICE), expected.flatten(0, -2).split(_SLICE), strict=True):
        own, other = own.float(), other.to(own.device).float()
        difference += _spread(own - other)
        scale += _spread(other)
    share = (difference / max(scale, 1e-60)) ** 0.5
    if not share <= _ROUNDING.get(model.dtype, 0.02):
        raise NumericalError(
            f"The compressed {type(model).__name__} predicts something else when it is loaded than its decoded weights "
            f"do (a difference of {share:.0%}); its architecture is not supported, and nothing was written."
        )
    return share


def _spread(values: Tensor) -> float:
    """Squared distance from the mean over classes: what is added to all classes of a prediction changes nothing."""
    return float((values - values.mean(-1, keepdim=True)).square().sum(dtype=torch.float64))
