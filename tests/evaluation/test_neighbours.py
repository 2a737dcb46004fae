"""Classes that the nearest other images vote for."""

from __future__ import annotations

import pytest
import torch

from shiftadd_cli.evaluation import neighbours
from shiftadd_cli.evaluation.neighbours import NEIGHBOURS, nearest_classes


def test_classes_match_a_plain_vote(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_ROWS_AT_ONCE", 7)
    g = torch.Generator().manual_seed(0)
    features, classes = torch.randn(40, 5, generator=g), torch.randint(0, 4, (40,), generator=g)
    winners = nearest_classes(features, classes)
    for image in range(40):
        cosines = sorted(
            (float(torch.cosine_similarity(features[image], features[other], dim=0)), other)
            for other in range(40)
            if other != image
        )[-NEIGHBOURS:]
        votes = [0.0] * 4
        for cosine, other in cosines:
            votes[int(classes[other])] += torch.tensor(cosine / 0.07).exp().item()
        assert votes[int(winners[image])] == max(votes)


def test_two_images_vote_for_each_other() -> None:
    assert nearest_classes(torch.eye(2), torch.tensor([0, 1])).tolist() == [1, 0]
