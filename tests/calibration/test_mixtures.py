"""Experts side by side: their turns, their room, and moments against sums over the tokens that each was sent."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import MIXTURES, save_tiny

from shiftadd_cli.blockwise.block_runner import BlockStream
from shiftadd_cli.blockwise.model import BlockwiseModel
from shiftadd_cli.blockwise.trace import trace_model
from shiftadd_cli.calibration import mixtures
from shiftadd_cli.calibration.hessian import gather_moments
from shiftadd_cli.calibration.mixtures import enough_tokens, expert_bytes, in_room, in_turns
from shiftadd_cli.source import LinearSpec, find_structure, open_source

CPU = torch.device("cpu")
WINDOWS = torch.randint(0, 256, (5, 16), generator=torch.Generator().manual_seed(1))


def last_block(path, batch_size=2):
    """The last block as a stream, and the linears in it."""
    source = open_source(str(path))
    structure = find_structure(source.skeleton())
    source.materialise(structure.outside)
    trace = trace_model(BlockwiseModel(source, structure), WINDOWS, batch_size)
    depth = len(structure.blocks) - 1
    source.materialise([structure.blocks[depth]])
    block = source.skeleton().get_submodule(structure.blocks[depth])
    calls = {index: each[depth] for index, each in trace.calls.items()}
    return BlockStream("block", block, trace.hidden, calls), [spec for spec in structure.linears if spec.block == depth]


def rows_by_token(stream, spec):
    """By sample and token, what the linear reads of it, by a hook on the experts' own forward."""
    found = {}
    block = stream.block
    experts = block.get_submodule(spec.experts)
    expert = int(spec.kind.removeprefix(f"{spec.experts}.").partition(".")[0])
    sent = {}

    def route(_, args):
        sent["tokens"] = [row for row, each in enumerate(args[1].tolist()) if expert in each]

    for index, batch in enumerate(stream.hidden):

        def note(_, args, index=index):
            for token, row in zip(sent["tokens"], args[0].double(), strict=True):
                found[index, token] = row

        handles = [
            experts.register_forward_pre_hook(route),
            block.get_submodule(spec.kind).register_forward_pre_hook(note),
        ]
        with torch.no_grad():
            stream.calls[index].run(block, batch)
        for handle in handles:
            handle.remove()
    return found


def changed(stream):
    """The stream of a block that routes some tokens to other experts."""
    block = copy.deepcopy(stream.block)
    generator = torch.Generator().manual_seed(3)
    twin = BlockStream("block", block, stream.hidden.copy(), stream.calls)
    for index, batch in enumerate(stream.hidden):
        twin.hidden.replace(index, batch + 0.3 * torch.randn(batch.shape, generator=generator))
    return twin


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_take_their_turns_together(tmp_path, family):
    stream, specs = last_block(save_tiny(family, tmp_path))
    turns = in_turns(stream.shared_inputs([spec.kind for spec in specs]), specs)
    assert sorted(kind for turn in turns for group in turn for kind in group) == sorted(spec.kind for spec in specs)
    mixture = next(spec.experts for spec in specs if spec.experts is not None)
    experts = range(stream.block.get_submodule(mixture).num_experts)
    together = [turn for turn in turns if len(turn) > 1]
    assert together == [
        [(f"{mixture}.{index}.gate_proj", f"{mixture}.{index}.up_proj") for index in experts],
        [(f"{mixture}.{index}.down_proj",) for index in experts],
    ]


def test_experts_that_were_not_seen_and_linears_that_are_skipped():
    def spec(kind, experts="mlp.experts"):
        return LinearSpec(f"b.{kind}", kind, 0, 4, 4, False, False, experts)

    kinds = ("0.up_proj", "0.down_proj", "1.gate_proj", "1.up_proj", "1.down_proj", "2.gate_proj", "2.up_proj")
    specs = [spec("q", None), *(spec(f"mlp.experts.{kind}") for kind in kinds)]
    groups = [("q",), ("mlp.experts.0.up_proj",), ("mlp.experts.0.down_proj",)]
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


def test_no_more_experts_at_once_than_there_is_room_for(monkeypatch):
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
def test_moments_are_of_the_tokens_that_an_expert_was_sent(tmp_path, family):
    stream, specs = last_block(save_tiny(family, tmp_path))
    mine = [spec for spec in specs if spec.experts is not None]
    for spec, moments in zip(mine, gather_moments(stream, [(spec.kind,) for spec in mine]), strict=True):
        rows = torch.stack(list(rows_by_token(stream, spec).values()))
        assert moments.tokens == len(rows)
        torch.testing.assert_close(moments.hessian.double(), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(moments.mean.double(), rows.mean(0), rtol=1e-4, atol=1e-5)
    k = stream.block.mlp.router.top_k if family == "gpt_oss" else stream.block.mlp.gate.top_k
    ups = [
        moments.tokens for moments in gather_moments(stream, [(s.kind,) for s in mine if s.kind.endswith("up_proj")])
    ]
    assert sum(ups) == k * WINDOWS.numel()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_token_is_compared_with_itself_in_the_original_whatever_else_the_expert_read_there(tmp_path, family):
    original, specs = last_block(save_tiny(family, tmp_path))
    now = changed(original)
    mine = [spec for spec in specs if spec.experts is not None]
    rerouted = 0
    for spec, moments in zip(mine, gather_moments(now, [(spec.kind,) for spec in mine], original), strict=True):
        rows, before = rows_by_token(now, spec), rows_by_token(original, spec)
        rerouted += len(rows.keys() ^ before.keys())
        # Nothing is known of a token that the original sends elsewhere.
        pairs = [(before.get(token, row), row) for token, row in rows.items()]
        cross = sum(torch.outer(unspoilt, row) for unspoilt, row in pairs) / len(pairs)
        torch.testing.assert_close(moments.cross.double(), cross, rtol=1e-4, atol=1e-5)
    assert rerouted > 0


def test_experts_that_no_token_is_sent_to_have_moments_of_nothing(tmp_path):
    stream, specs = last_block(save_tiny("olmoe", tmp_path))

    def route(_, __, output):
        return (*output[:2], torch.tensor([0, 1]).expand_as(output[2]))

    stream.block.mlp.gate.register_forward_hook(route)
    kinds = [spec.kind for spec in specs]
    turns = [turn for turn in in_turns(stream.shared_inputs(kinds), specs) if len(turn) > 1]
    for turn in turns:
        moments = gather_moments(stream, turn, stream)
        assert [each.tokens for each in moments] == [WINDOWS.numel()] * 2 + [0] * 3
        for each in moments:
            assert all(torch.isfinite(part).all() for part in (each.hessian, each.mean, each.cross, each.cross_mean))
            assert bool(each.hessian.any()) == (each.tokens > 0)


def test_an_expert_needs_as_many_tokens_as_inputs():
    expert = LinearSpec("b.e.0.up", "e.0.up", 0, 8, 16, False, False, "e")
    assert enough_tokens(expert, 16)
    assert not enough_tokens(expert, 15)
    plain = LinearSpec("b.up", "up", 0, 8, 16, False, False)
    assert enough_tokens(plain, 1)
    assert not enough_tokens(plain, 0)
