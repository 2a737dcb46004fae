"""Experts side by side: their turns, their memory, and their moments against sums over the tokens sent to each."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from block_streams import block_stream
from tiny_models import MIXTURES, save_tiny
from torch import Tensor, nn

from shiftadd_cli.blockwise.block_runner import BlockStream
from shiftadd_cli.calibration import mixtures
from shiftadd_cli.calibration.hessian import gather_moments
from shiftadd_cli.calibration.mixtures import Group, enough_tokens, expert_bytes, in_room, in_turns
from shiftadd_cli.source import LinearSpec

WINDOWS = torch.randint(0, 256, (5, 16), generator=torch.Generator().manual_seed(1))


def last_block(path: Path, batch_size: int = 2) -> tuple[BlockStream, list[LinearSpec]]:
    """The last block as a stream, and the linears in it."""
    return block_stream(path, WINDOWS, batch_size, depth=-1)


def rows_by_token(stream: BlockStream, spec: LinearSpec) -> dict[tuple[int, int], Tensor]:
    """Rows that the linear reads, by batch and token, from hooks on the experts' own forward."""
    assert spec.experts is not None
    row_of_token: dict[tuple[int, int], Tensor] = {}
    block = stream.block
    experts = block.get_submodule(spec.experts)
    expert = int(spec.kind.removeprefix(f"{spec.experts}.").partition(".")[0])
    sent: dict[str, list[int]] = {}

    def route(_: nn.Module, args: tuple[Any, ...]) -> None:
        sent["tokens"] = [row for row, chosen in enumerate(args[1].tolist()) if expert in chosen]

    for index, batch in enumerate(stream.hidden):

        def note(_: nn.Module, args: tuple[Any, ...], index: int = index) -> None:
            for token, row in zip(sent["tokens"], args[0].double(), strict=True):
                row_of_token[index, token] = row

        handles = [
            experts.register_forward_pre_hook(route),
            block.get_submodule(spec.kind).register_forward_pre_hook(note),
        ]
        with torch.no_grad():
            stream.calls[index].run(block, batch)
        for handle in handles:
            handle.remove()
    return row_of_token


def changed(stream: BlockStream) -> BlockStream:
    """The stream of a block that routes some tokens to other experts."""
    block = copy.deepcopy(stream.block)
    generator = torch.Generator().manual_seed(3)
    twin = BlockStream("block", block, copy.deepcopy(stream.hidden), stream.calls)
    for index, batch in enumerate(stream.hidden):
        twin.hidden.replace(index, batch + 0.3 * torch.randn(batch.shape, generator=generator))
    return twin


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_share_their_turns(tmp_path: Path, family: str) -> None:
    stream, specs = last_block(save_tiny(family, tmp_path))
    turns = in_turns(stream.shared_inputs([spec.kind for spec in specs]), specs)
    assert sorted(kind for turn in turns for group in turn for kind in group) == sorted(spec.kind for spec in specs)
    mixture = next(spec.experts for spec in specs if spec.experts is not None)
    module: Any = stream.block.get_submodule(mixture)
    experts = range(module.num_experts)
    together = [turn for turn in turns if len(turn) > 1]
    assert together == [
        [(f"{mixture}.{index}.gate_proj", f"{mixture}.{index}.up_proj") for index in experts],
        [(f"{mixture}.{index}.down_proj",) for index in experts],
    ]


def test_unseen_experts_take_part_and_skipped_linears_do_not() -> None:
    def spec(kind: str, experts: str | None = "mlp.experts") -> LinearSpec:
        return LinearSpec(f"b.{kind}", kind, 0, 4, 4, False, False, experts)

    kinds = ("0.up_proj", "0.down_proj", "1.gate_proj", "1.up_proj", "1.down_proj", "2.gate_proj", "2.up_proj")
    specs = [spec("q", None), *(spec(f"mlp.experts.{kind}") for kind in kinds)]
    groups: list[Group] = [("q",), ("mlp.experts.0.up_proj",), ("mlp.experts.0.down_proj",)]
    groups += [("mlp.experts.1.gate_proj", "mlp.experts.1.up_proj"), ("mlp.experts.1.down_proj",)]
    assert in_turns(groups, specs) == [
        [("q",)],
        [
            ("mlp.experts.0.up_proj",),
            ("mlp.experts.1.gate_proj", "mlp.experts.1.up_proj"),
            ("mlp.experts.2.gate_proj", "mlp.experts.2.up_proj"),
        ],
        [("mlp.experts.0.down_proj",), ("mlp.experts.1.down_proj",)],
    ]
    assert in_turns([("q",)], specs[:1]) == [[("q",)]]


def test_parts_have_as_many_experts_as_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [LinearSpec("b.q", "q", 0, 8, 1000, False, False)]
    specs += [LinearSpec(f"b.e.{i}.up", f"e.{i}.up", 0, 8, 10, False, False, "e") for i in range(5)]
    groups = [(spec.kind,) for spec in specs]
    monkeypatch.setattr(mixtures, "ROOM_BYTES", 2 * expert_bytes(10, cross=True))
    assert [len(part) for part in in_room(groups, specs, cross=True)] == [3, 2, 1]
    assert [len(part) for part in in_room(groups, specs, cross=False)] == [5, 1]
    assert [group for part in in_room(groups, specs, cross=True) for group in part] == groups
    monkeypatch.setattr(mixtures, "ROOM_BYTES", 0)
    assert [len(part) for part in in_room(groups, specs, cross=True)] == [1] * 6


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_moments_cover_the_tokens_sent_to_an_expert(tmp_path: Path, family: str) -> None:
    stream, specs = last_block(save_tiny(family, tmp_path))
    expert_specs = [spec for spec in specs if spec.experts is not None]
    for spec, moments in zip(
        expert_specs, gather_moments(stream, [(spec.kind,) for spec in expert_specs]), strict=True
    ):
        rows = torch.stack(list(rows_by_token(stream, spec).values()))
        assert moments.tokens == len(rows)
        torch.testing.assert_close(moments.hessian.double(), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(moments.mean.double(), rows.mean(0), rtol=1e-4, atol=1e-5)
    mlp: Any = stream.block.get_submodule("mlp")
    k = mlp.router.top_k if family == "gpt_oss" else mlp.gate.top_k
    up_tokens = [
        moments.tokens
        for moments in gather_moments(stream, [(s.kind,) for s in expert_specs if s.kind.endswith("up_proj")])
    ]
    assert sum(up_tokens) == k * WINDOWS.numel()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_cross_moments_pair_each_token_with_itself_in_the_original(tmp_path: Path, family: str) -> None:
    original, specs = last_block(save_tiny(family, tmp_path))
    current = changed(original)
    expert_specs = [spec for spec in specs if spec.experts is not None]
    rerouted = 0
    for spec, moments in zip(
        expert_specs, gather_moments(current, [(spec.kind,) for spec in expert_specs], original), strict=True
    ):
        rows, original_rows = rows_by_token(current, spec), rows_by_token(original, spec)
        rerouted += len(rows.keys() ^ original_rows.keys())
        # A token that the original sends to another expert is paired with itself.
        pairs = [(original_rows.get(token, row), row) for token, row in rows.items()]
        cross = sum(torch.outer(reference, row) for reference, row in pairs) / len(pairs)
        assert moments.cross is not None
        torch.testing.assert_close(moments.cross.double(), cross, rtol=1e-4, atol=1e-5)
    assert rerouted > 0


def test_experts_without_tokens_have_zero_moments(tmp_path: Path) -> None:
    stream, specs = last_block(save_tiny("olmoe", tmp_path))

    def route(_: nn.Module, __: Any, output: Any) -> tuple[Any, ...]:
        return (*output[:2], torch.tensor([0, 1]).expand_as(output[2]))

    stream.block.get_submodule("mlp.gate").register_forward_hook(route)
    kinds = [spec.kind for spec in specs]
    turns = [turn for turn in in_turns(stream.shared_inputs(kinds), specs) if len(turn) > 1]
    for turn in turns:
        moments = gather_moments(stream, turn, stream)
        assert [expert_moments.tokens for expert_moments in moments] == [WINDOWS.numel()] * 2 + [0] * 3
        for expert_moments in moments:
            for part in (expert_moments.hessian, expert_moments.mean, expert_moments.cross, expert_moments.cross_mean):
                assert part is not None
                assert torch.isfinite(part).all()
            assert bool(expert_moments.hessian.any()) == (expert_moments.tokens > 0)


def test_an_expert_needs_as_many_tokens_as_inputs() -> None:
    expert = LinearSpec("b.e.0.up", "e.0.up", 0, 8, 16, False, False, "e")
    assert enough_tokens(expert, 16)
    assert not enough_tokens(expert, 15)
    plain = LinearSpec("b.up", "up", 0, 8, 16, False, False)
    assert enough_tokens(plain, 1)
    assert not enough_tokens(plain, 0)
