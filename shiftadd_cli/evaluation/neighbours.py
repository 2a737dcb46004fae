"""Quality of features without a head: the class of an image predicted from its nearest neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBOURS = 10
# A vote has the weight exp(cosine / temperature), as in DINO (Caron et al. 2021, arXiv:2104.14294).
_TEMPERATURE = 0.07
_ROWS_AT_ONCE = 1024


def nearest_classes(features: Tensor, classes: Tensor) -> Tensor:
    """The class that the `NEIGHBOURS` nearest other images by cosine vote for: int64 `[images]`.

    features: float32 `[images, width]`; classes: int64 `[images]`, from 0. With fewer images, all other images vote.
    """
    units = torch.nn.functional.normalize(features.float(), dim=-1)
    count = min(NEIGHBOURS, len(units) - 1)
    votes = torch.nn.functional.one_hot(classes).float()
    winners = []
    for start in range(0, len(units), _ROWS_AT_ONCE):
        near = units[start : start + _ROWS_AT_ONCE] @ units.T
        rows = torch.arange(len(near))
        near[rows, rows + start] = -torch.inf  # an image does not vote on itself
        cosines, indices = near.topk(count)
        weights = ((cosines - cosines[:, :1]) / _TEMPERATURE).exp().unsqueeze(-1)
        winners.append((weights * votes[indices]).sum(1).argmax(-1))
    return torch.cat(winners)
