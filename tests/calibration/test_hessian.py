"""Moments of linears' inputs against float64 sums over the inputs of a plain forward pass."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from block_streams import block_stream
from tiny_models import save_tiny
from torch import Tensor, nn

from shiftadd_cli.blockwise.block_runner import BlockStream
from shiftadd_cli.calibration.hessian import Moments, gather_moments

WINDOWS = torch.randint(0, 256, (5, 16), generator=torch.Generator().manual_seed(1))


def first_block(path: Path, batch_size: int) -> tuple[BlockStream, list[str]]:
    """The first block as a stream, and the linears in it."""
    stream, specs = block_stream(path, WINDOWS, batch_size)
    return stream, [spec.kind for spec in specs]


def inputs_of(block: nn.Module, stream: BlockStream, kinds: list[str]) -> dict[str, Tensor]:
    """Rows that each linear reads in a plain pass over all batches, float64 `[tokens, in]`."""
    rows: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
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
def test_moments_equal_those_of_a_plain_forward_pass(tmp_path: Path, family: str, batch_size: int) -> None:
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


def test_constant_inputs_keep_a_positive_spread() -> None:
    hessian = torch.full((2, 2), 9.0)
    spread = Moments(hessian, torch.tensor([3.0, 3.0]).nextafter(torch.tensor(4.0))).about_mean().hessian
    assert (spread.diagonal() > 0).all()
    assert (spread.diagonal() < 1e-3).all()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_cross_moments_pair_current_inputs_with_those_of_the_original(tmp_path: Path, family: str) -> None:
    save_tiny(family, tmp_path)
    stream, kinds = first_block(tmp_path, 2)
    changed = copy.deepcopy(stream.block)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1.1)
    current = BlockStream("block", changed, copy.deepcopy(stream.hidden), stream.calls)
    for index, batch in enumerate(current.hidden):
        current.hidden.replace(index, batch + 0.1)
    groups = current.shared_inputs(kinds)
    rows, original = inputs_of(changed, current, kinds), inputs_of(stream.block, stream, kinds)
    for group, moments in zip(groups, gather_moments(current, groups, stream), strict=True):
        x, reference = rows[group[0]], original[group[0]]
        torch.testing.assert_close(moments.hessian.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        assert moments.cross is not None
        torch.testing.assert_close(moments.cross.double(), reference.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_linears_that_read_one_tensor_share_its_moment(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    stream, kinds = first_block(tmp_path, 2)
    groups = [tuple(kind.rpartition(".")[2] for kind in group) for group in stream.shared_inputs(kinds)]
    assert groups == [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_weighted_moments_count_every_token_by_its_weight(tmp_path: Path, family: str) -> None:
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
        assert moments.cross is not None
        torch.testing.assert_close(moments.cross.double(), expected, rtol=1e-4, atol=1e-5)
        mean = (x * weight.double().reshape(-1, 1)).mean(0)
        torch.testing.assert_close(moments.mean.double(), mean, rtol=1e-4, atol=1e-5)


def test_weights_of_one_change_no_bit(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    stream, kinds = first_block(tmp_path, 2)
    groups = stream.shared_inputs(kinds)
    ones = [torch.ones(WINDOWS.shape)] * len(groups)
    for plain, weighted in zip(
        gather_moments(stream, groups), gather_moments(stream, groups, weights=ones), strict=True
    ):
        assert torch.equal(plain.hessian, weighted.hessian)


def test_inputs_with_only_some_tokens_are_not_weighted(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    stream, _ = first_block(tmp_path, 5)
    mlp: Any = stream.block.get_submodule("mlp")
    # Like the experts of a mixture, the linear reads only some rows.
    mlp.forward = lambda hidden: mlp.down_proj(hidden.new_ones(7, mlp.down_proj.in_features)).sum() + hidden
    (moments,) = gather_moments(stream, [("mlp.down_proj",)], weights=[torch.full(WINDOWS.shape, 0.5)])
    assert torch.equal(moments.hessian, torch.ones_like(moments.hessian))
