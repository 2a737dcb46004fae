"""Blocks that run one by one, and predictions computed in slices, against the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, save_tiny
from torch import Tensor, nn

from shiftadd_cli.blockwise import probe_model as probe_model_module
from shiftadd_cli.blockwise.model import BlockwiseModel
from shiftadd_cli.blockwise.probe_model import ProbeModel
from shiftadd_cli.source import find_structure, open_source

WINDOWS = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(1))


def run_to_the_end(replay: ProbeModel, hidden: Tensor, blocks: int) -> Tensor:
    for depth in range(blocks):
        replay.model.load(depth)
        hidden = replay.run(depth, hidden)
        replay.model.release(depth)
    return hidden


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [2, 8])
def test_divergences_of_disturbed_states_equal_those_of_the_whole_model(
    tmp_path: Path, family: str, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first block's input is disturbed. Slices have seven tokens, so they split windows."""
    source = open_source(str(save_tiny(family, tmp_path)))
    structure = find_structure(source.skeleton())
    replay = ProbeModel(BlockwiseModel(source, structure), WINDOWS, batch_size)
    noise = 0.1 * torch.randn(replay.hidden.shape, generator=torch.Generator().manual_seed(2))
    blocks = len(structure.blocks)
    original, other = (run_to_the_end(replay, hidden, blocks) for hidden in (replay.hidden, replay.hidden + noise))
    model = source.load_model(torch.float32)
    vocabulary = model.config.vocab_size
    monkeypatch.setattr(probe_model_module, "_SLICE_BYTES", 7 * 20 * vocabulary)
    same, divergence = replay.divergences(original, [original, other])

    def disturb(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        rest = dict(kwargs)
        hidden = args[0] if args else rest.pop("hidden_states")
        return (hidden + noise, *args[1:]), rest

    with torch.no_grad():
        reference = model(input_ids=WINDOWS, use_cache=False).logits.double().log_softmax(-1)
        model.get_submodule(structure.blocks[0]).register_forward_pre_hook(disturb, with_kwargs=True)
        disturbed = model(input_ids=WINDOWS, use_cache=False).logits.double().log_softmax(-1)
    expected = float((reference.exp() * (reference - disturbed)).sum(-1).mean())
    assert same == 0
    assert expected > 1e-5
    assert divergence == pytest.approx(expected, rel=1e-3)


def test_probe_models_are_float32_and_leave_the_source_unloaded(tmp_path: Path) -> None:
    source = open_source(str(save_tiny("llama", tmp_path, dtype=torch.bfloat16)))
    structure = find_structure(source.skeleton())
    replay = ProbeModel(BlockwiseModel(source, structure), WINDOWS, 2)
    block = replay.model.load(0)
    assert replay.hidden.dtype == replay.run(0, replay.hidden).dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in block.parameters())
    assert all(parameter.is_meta for parameter in source.skeleton().parameters())
    replay.model.release(0)
    assert all(parameter.is_meta for parameter in block.parameters())
