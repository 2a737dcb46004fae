"""Loads checkpoints through transformers, and compares models."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_models import VOCAB_SIZE
from transformers import AutoModelForCausalLM, PreTrainedModel

from shiftadd_cli.runtime.transformers_plugin import register

register()
IDS = torch.randint(0, VOCAB_SIZE, (2, 17), generator=torch.Generator().manual_seed(0))


def load(folder: Path, **options: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(IDS).logits


def assert_close(one: torch.Tensor, other: torch.Tensor, eps: float = 1e-4) -> None:
    assert torch.isfinite(other).all()
    assert (one.float() - other.float()).abs().max() <= eps * other.float().abs().max()


def assert_same_state(one: PreTrainedModel, other: PreTrainedModel) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype
        assert torch.equal(tensor, right[name])
