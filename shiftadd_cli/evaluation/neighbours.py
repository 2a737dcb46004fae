"""What features are worth without a head: classes told by the nearest other images."""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBOURS = 10
# Of the weights of votes: exp(cosine / temperature), as in DINO (Caron et al. 2021, arXiv:2104.14294).
_TEMPERATURE = 0.07
_ROWS_AT_ONCE = 1024


def nearest_classes(features: Tensor, classes: Tensor) -> Tensor:
    """The class that the `NEIGHBOURS` nearest other images by cosine vote for: int64 `[images]`.

    features: float32 `[images, width]`; classes: int64 `[images]`, from 0. With fewer images all others vote.
    """
    units = torch.nn.functional.normalize(features.float(), dim=-1)
    count = min(NEIGHBOURS, len(units) - 1)
    votes = torch.nn.functional.one_hot(classes).float()
    found = []
    for start in range(0, len(units), _ROWS_AT_ONCE):
        near = units[start : start + _ROWS_AT_ONCE] @ units.T
        rows = torch.arange(len(near))
        near[rows, rows + start] = -torch.inf  # an image has no vote on itself
        cosines, indices = near.topk(count)
        weights = ((cosines - cosines[:, :1]) / _TEMPERATURE).exp().unsqueeze(-1)
        found.append((weights * votes[indices]).sum(1).argmax(-1))
    return torch.cat(found)
