"""Blocks run one by one, and predictions taken in slices, against the whole model."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, save_tiny

from shiftadd_cli.blockwise import probe_model as replay_module
from shiftadd_cli.blockwise.model import BlockwiseModel
from shiftadd_cli.blockwise.probe_model import ProbeModel
from shiftadd_cli.source import find_structure, open_source

CPU = torch.device("cpu")
WINDOWS = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(1))


def to_the_end(replay, hidden, blocks):
    for depth in range(blocks):
        replay.model.load(depth)
        hidden = replay.run(depth, hidden)
        replay.model.release(depth)
    return hidden


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [2, 8])
def test_the_divergence_of_other_states_is_that_of_the_whole_model(tmp_path, family, batch_size, monkeypatch):
    """The first block's input is disturbed; in slices of seven tokens, which cut windows apart."""
    source = open_source(str(save_tiny(family, tmp_path)))
    structure = find_structure(source.skeleton())
    replay = ProbeModel(BlockwiseModel(source, structure), WINDOWS, batch_size)
    noise = 0.1 * torch.randn(replay.hidden.shape, generator=torch.Generator().manual_seed(2))
    blocks = len(structure.blocks)
    original, other = (to_the_end(replay, hidden, blocks) for hidden in (replay.hidden, replay.hidden + noise))
    model = source.load_model(torch.float32)
    vocabulary = model.config.vocab_size
    monkeypatch.setattr(replay_module, "_SLICE_BYTES", 7 * 20 * vocabulary)
    same, found = replay.divergences(original, [original, other])

    def disturb(_, args, kwargs):
        rest = dict(kwargs)
        hidden = args[0] if args else rest.pop("hidden_states")
        return (hidden + noise, *args[1:]), rest

    with torch.no_grad():
        reference = model(input_ids=WINDOWS, use_cache=False).logits.double().log_softmax(-1)
        model.get_submodule(structure.blocks[0]).register_forward_pre_hook(disturb, with_kwargs=True)
        chances = model(input_ids=WINDOWS, use_cache=False).logits.double().log_softmax(-1)
    expected = float((reference.exp() * (reference - chances)).sum(-1).mean())
    assert same == 0
    assert expected > 1e-5
    assert found == pytest.approx(expected, rel=1e-3)


def test_all_is_in_float32_and_apart_from_the_source(tmp_path):
    source = open_source(str(save_tiny("llama", tmp_path, dtype=torch.bfloat16)))
    structure = find_structure(source.skeleton())
    replay = ProbeModel(BlockwiseModel(source, structure), WINDOWS, 2)
    block = replay.model.load(0)
    assert replay.hidden.dtype == replay.run(0, replay.hidden).dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in block.parameters())
    assert all(parameter.is_meta for parameter in source.skeleton().parameters())
    replay.model.release(0)
    assert all(parameter.is_meta for parameter in block.parameters())
