"""Moments of linears' inputs against a float64 sum over what a plain forward pass feeds them."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import save_tiny

from shiftadd_cli.blockwise.block_runner import BlockStream
from shiftadd_cli.blockwise.model import BlockwiseModel
from shiftadd_cli.blockwise.trace import trace_model
from shiftadd_cli.calibration.hessian import Moments, gather_moments
from shiftadd_cli.source import find_structure, open_source

CPU = torch.device("cpu")
WINDOWS = torch.randint(0, 256, (5, 16), generator=torch.Generator().manual_seed(1))


def first_block(path, batch_size):
    """The first block as a stream, and the linears in it."""
    source = open_source(str(path))
    structure = find_structure(source.skeleton())
    source.materialise(structure.outside)
    trace = trace_model(BlockwiseModel(source, structure), WINDOWS, batch_size)
    source.materialise([structure.blocks[0]])
    block = source.skeleton().get_submodule(structure.blocks[0])
    calls = {index: each[0] for index, each in trace.calls.items()}
    kinds = [spec.kind for spec in structure.linears if spec.block == 0]
    return BlockStream("block", block, trace.hidden, calls), kinds


def inputs_of(block, stream, kinds):
    """Rows that each linear reads in a plain pass over all batches, float64 `[tokens, in]`."""
    rows = {kind: [] for kind in kinds}
    handles = [
        block.get_submodule(kind).register_forward_pre_hook(
            lambda module, args, kind=kind: rows[kind].append(args[0].double().reshape(-1, args[0].shape[-1]))
        )
        for kind in kinds
    ]
    with torch.no_grad():
        for index, batch in enumerate(stream.hidden):
            stream.calls[index].run(block, batch)
    for handle in handles:
        handle.remove()
    return {kind: torch.cat(parts) for kind, parts in rows.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("batch_size", [2, 5])
def test_moments_equal_those_of_a_plain_forward_pass(tmp_path, family, batch_size):
    save_tiny(family, tmp_path)
    stream, kinds = first_block(tmp_path, batch_size)
    groups = stream.shared_inputs(kinds)
    assert sorted(kind for group in groups for kind in group) == sorted(kinds)
    rows = inputs_of(stream.block, stream, kinds)
    for group, moments in zip(groups, gather_moments(stream, groups), strict=True):
        assert moments.cross is None
        for kind in group:
            expected = rows[kind].T @ rows[kind] / len(rows[kind])
            torch.testing.assert_close(moments.hessian.double(), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(moments.mean.double(), rows[kind].mean(0), rtol=1e-4, atol=1e-5)
            spread = torch.cov(rows[kind].T, correction=0)
            torch.testing.assert_close(moments.about_mean().hessian.double(), spread, rtol=1e-3, atol=1e-5)


def test_inputs_that_never_change_keep_a_positive_spread():
    hessian = torch.full((2, 2), 9.0)
    spread = Moments(hessian, torch.tensor([3.0, 3.0]).nextafter(torch.tensor(4.0))).about_mean().hessian
    assert (spread.diagonal() > 0).all()
    assert (spread.diagonal() < 1e-3).all()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_cross_moments_pair_what_is_read_now_with_what_the_original_reads(tmp_path, family):
    save_tiny(family, tmp_path)
    stream, kinds = first_block(tmp_path, 2)
    changed = copy.deepcopy(stream.block)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1.1)
    now = BlockStream("block", changed, stream.hidden.copy(), stream.calls)
    for index, batch in enumerate(now.hidden):
        now.hidden.replace(index, batch + 0.1)
    groups = now.shared_inputs(kinds)
    rows, original = inputs_of(changed, now, kinds), inputs_of(stream.block, stream, kinds)
    for group, moments in zip(groups, gather_moments(now, groups, stream), strict=True):
        x, unspoilt = rows[group[0]], original[group[0]]
        torch.testing.assert_close(moments.hessian.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(moments.cross.double(), unspoilt.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_linears_that_read_one_tensor_share_its_moment(tmp_path):
    save_tiny("llama", tmp_path)
    stream, kinds = first_block(tmp_path, 2)
    groups = [tuple(kind.rpartition(".")[2] for kind in group) for group in stream.shared_inputs(kinds)]
    assert groups == [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_weighted_moments_count_every_token_by_its_weight(tmp_path, family):
    save_tiny(family, tmp_path)
    # Five windows in batches of two: the last batch is smaller. OPT's last two linears read rows of all tokens.
    stream, kinds = first_block(tmp_path, 2)
    groups = stream.shared_inputs(kinds)
    generator = torch.Generator().manual_seed(2)
    weights = [torch.rand(WINDOWS.shape, generator=generator) for _ in groups]
    rows = inputs_of(stream.block, stream, kinds)
    gathered = gather_moments(stream, groups, stream, weights)
    for group, moments, weight in zip(groups, gathered, weights, strict=True):
        x = rows[group[0]]
        expected = (x * weight.double().reshape(-1, 1)).T @ x / len(x)
        torch.testing.assert_close(moments.hessian.double(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(moments.cross.double(), expected, rtol=1e-4, atol=1e-5)
        mean = (x * weight.double().reshape(-1, 1)).mean(0)
        torch.testing.assert_close(moments.mean.double(), mean, rtol=1e-4, atol=1e-5)


def test_weights_of_one_change_no_bit(tmp_path):
    save_tiny("llama", tmp_path)
    stream, kinds = first_block(tmp_path, 2)
    groups = stream.shared_inputs(kinds)
    ones = [torch.ones(WINDOWS.shape)] * len(groups)
    for plain, weighted in zip(
        gather_moments(stream, groups), gather_moments(stream, groups, weights=ones), strict=True
    ):
        assert torch.equal(plain.hessian, weighted.hessian)


def test_inputs_that_are_not_all_tokens_are_not_weighted(tmp_path):
    save_tiny("llama", tmp_path)
    stream, _ = first_block(tmp_path, 5)
    mlp = stream.block.mlp
    # As the experts of a mixture do, the linear reads some rows.
    mlp.forward = lambda hidden: mlp.down_proj(hidden.new_ones(7, mlp.down_proj.in_features)).sum() + hidden
    (moments,) = gather_moments(stream, [("mlp.down_proj",)], weights=[torch.full(WINDOWS.shape, 0.5)])
    assert torch.equal(moments.hessian, torch.ones_like(moments.hessian))
