"""All blocks in one call of the kernels against calls of single blocks (for these see `test_decoder_block`)."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import Checkpoint
from compiled import needs_kernels
from decoding import Between, decode, write_decoders
from loading import IDS, assert_close, load
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from shiftadd_cli.runtime.fused_decode import block as decoder_block
from shiftadd_cli.runtime.fused_decode.stack import LookupModel, current_pass
from shiftadd_cli.runtime.fused_decode.stack_plan import StackPlan
from shiftadd_cli.runtime.kv_cache import RoomLayer

pytestmark = needs_kernels
WHOLE = ("llama", "qwen2", "qwen3", "smollm3", "granite", "olmo2")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    return write_decoders((*WHOLE, "mistral", "gemma3"), tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each cache held, for every call that computed all blocks."""
    found: list[int] = []
    whole = StackPlan.decode

    def counted(self: StackPlan, *given: Any) -> Tensor:
        found.append(given[-1].tokens)
        return whole(self, *given)

    monkeypatch.setattr(StackPlan, "decode", counted)
    return found


def by_blocks(monkeypatch: pytest.MonkeyPatch, compute: Callable[[], Tensor]) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(decoder_block, "current_pass", lambda: None)
        return compute()


@pytest.mark.parametrize("family", WHOLE)
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_are_those_of_single_blocks(
    checkpoints: dict[str, Checkpoint],
    family: str,
    rows: int,
    dtype: torch.dtype,
    calls: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = load(checkpoints[family].folder, dtype=dtype)
    found = decode(model, rows)
    # The first token made the plans of the blocks.
    assert calls == [10, 11, 12, 13, 14]
    assert torch.equal(found, by_blocks(monkeypatch, lambda: decode(model, rows)))
    assert len(calls) == 5


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_blocks_that_may_see_different_tokens_stay_single(
    checkpoints: dict[str, Checkpoint], family: str, calls: list[int]
) -> None:
    folder, dense = checkpoints[family]
    assert_close(decode(load(folder)), decode(dense), 1e-4)
    assert not calls


def test_a_window_that_the_cache_does_not_know_is_kept(checkpoints: dict[str, Checkpoint], calls: list[int]) -> None:
    folder, dense = checkpoints["mistral"]
    found = []
    with torch.no_grad():
        for model in (load(folder), dense):
            cache = DynamicCache()
            model(IDS, past_key_values=cache)
            found.append(torch.cat([model(IDS[:, i : i + 1], past_key_values=cache).logits for i in range(5)]))
    assert_close(*found, 1e-4)
    assert not calls


def _crop(model: PreTrainedModel, cache: DynamicCache) -> None:
    cache.crop(-2)


def _reorder(model: PreTrainedModel, cache: DynamicCache) -> None:
    cache.reorder_cache(torch.tensor([1, 1]))


def _prompt_again(model: PreTrainedModel, cache: DynamicCache) -> None:
    model(IDS[:2, :4], past_key_values=cache)


def _copy_layers(model: PreTrainedModel, cache: DynamicCache) -> None:
    cache.layers[:] = copy.deepcopy(cache.layers)


def _look(model: PreTrainedModel, cache: DynamicCache) -> None:
    assert all(isinstance(layer, RoomLayer) for layer in cache.layers)
    assert {layer.keys.shape[2] for layer in cache.layers} == {cache.get_seq_length()} == {12}


def _watch_inside(model: PreTrainedModel, cache: DynamicCache) -> None:
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *given: given[-1] + 1)


def _watch_a_block(model: PreTrainedModel, cache: DynamicCache) -> None:
    model.model.layers[0].register_forward_hook(lambda *given: given[-1] * 2)


def _patch_a_block(model: PreTrainedModel, cache: DynamicCache) -> None:
    whole = model.model.layers[1].forward
    model.model.layers[1].forward = lambda hidden, *args, **kwargs: whole(hidden, *args, **kwargs) + 1


def _swap_blocks(model: PreTrainedModel, cache: DynamicCache) -> None:
    layers = model.model.layers
    layers[0].mlp, layers[1].mlp = layers[1].mlp, layers[0].mlp


def _fewer_blocks(model: PreTrainedModel, cache: DynamicCache) -> None:
    model.config.num_hidden_layers = 1


@pytest.mark.parametrize(
    "between",
    [
        _crop,
        _reorder,
        _prompt_again,
        _copy_layers,
        _look,
        _watch_inside,
        _watch_a_block,
        _patch_a_block,
        _swap_blocks,
        _fewer_blocks,
    ],
)
def test_whatever_happens_in_between_counts(
    checkpoints: dict[str, Checkpoint], between: Between, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoints["llama"].folder
    found = decode(load(folder), 2, between=between)
    assert calls[:2] == [10, 11]
    expected = by_blocks(monkeypatch, lambda: decode(load(folder), 2, between=None if between is _look else between))
    assert_close(found, expected, 1e-5)
    if between not in (_copy_layers, _look):
        assert (found - decode(load(folder), 2)).abs().max() > 1e-4


def test_hidden_states_are_those_of_every_block(checkpoints: dict[str, Checkpoint], calls: list[int]) -> None:
    model = load(checkpoints["llama"].folder)
    found = decode(model)
    states: list[Any] = []

    def record(model: PreTrainedModel, cache: DynamicCache) -> None:
        states.append(model(IDS[:1, :1], past_key_values=cache, output_hidden_states=True).hidden_states)
        cache.crop(-1)

    assert_close(decode(model, between=record), found, 1e-5)
    (seen,) = states
    assert len(seen) == model.config.num_hidden_layers + 1
    assert all(not torch.equal(*pair) for pair in itertools.pairwise(seen))


def test_a_block_that_is_called_by_itself_computes_itself(checkpoints: dict[str, Checkpoint], calls: list[int]) -> None:
    model = load(checkpoints["llama"].folder)
    decode(model)
    calls.clear()
    block, hidden = model.model.layers[0], torch.randn(1, 1, model.config.hidden_size)
    with torch.no_grad():
        positions = model.model.rotary_emb(hidden, position_ids=torch.tensor([[3]]))
        found = block(hidden, position_embeddings=positions)
        rest = model.model.layers[1](found, position_embeddings=positions)
    assert not calls
    assert not torch.equal(found, rest)
    assert current_pass() is None


def test_who_looks_at_the_blocks_while_they_run_sees_all_of_them(checkpoints: dict[str, Checkpoint]) -> None:
    model = load(checkpoints["llama"].folder)
    decode(model)
    layers, seen = model.model.layers, []

    def look(*_: Any) -> None:
        found = model.model.layers
        seen.append((len(found), found[1], list(found), [name for name, _ in found.named_children()]))

    # Before the first block, and when it has computed all of them.
    for module in (model.model.embed_tokens, model.model.norm):
        module.register_forward_hook(look)
    decode(model, tokens=2)
    assert isinstance(layers, torch.nn.ModuleList)
    assert model.model.layers is layers
    assert seen == [(2, layers[1], list(layers), ["0", "1"])] * 6


def test_threads_of_the_program_do_not_meet(checkpoints: dict[str, Checkpoint]) -> None:
    model = load(checkpoints["llama"].folder)
    expected = [decode(model, rows, 12) for rows in (1, 2, 3)]
    found: dict[int, Tensor] = {}

    def work(rows: int) -> None:
        for _ in range(4):
            found[rows] = decode(model, rows, 12)

    threads = [threading.Thread(target=work, args=(rows,)) for rows in (1, 2, 3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert all(torch.equal(found[rows], each) for rows, each in enumerate(expected, 1))


def test_to_everybody_else_the_model_is_what_it_was(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    folder, dense = checkpoints["llama"]
    model = load(folder)
    before = decode(model)
    assert isinstance(model.model, LookupModel)
    assert isinstance(model.model, type(dense.model))
    assert str(type(model.model)) == str(type(dense.model))
    assert inspect.signature(model.model.forward) == inspect.signature(dense.model.forward)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(twin.model, LookupModel)
        assert torch.equal(decode(twin), before)
    decoder_block.fuse_blocks(model)
    assert torch.equal(decode(model), before)
    decoder_block.part_blocks(model)
    assert type(model.model) is type(dense.model)
    assert_close(decode(model), before, 1e-5)
