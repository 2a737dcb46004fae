"""All blocks in one call of the kernels, compared with calls of single blocks (tested in `test_block`)."""

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
from decoding import Between, decode, decode_in_parts, write_decoders
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
    """The number of tokens in the cache, for every call that computed all blocks."""
    lengths: list[int] = []
    decode_all = StackPlan.decode

    def counted(self: StackPlan, *arguments: Any) -> Tensor:
        lengths.append(arguments[-1].tokens)
        return decode_all(self, *arguments)

    monkeypatch.setattr(StackPlan, "decode", counted)
    return lengths


def by_blocks(monkeypatch: pytest.MonkeyPatch, compute: Callable[[], Tensor]) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(decoder_block, "current_pass", lambda: None)
        return compute()


@pytest.mark.parametrize("family", WHOLE)
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_equal_those_of_single_blocks(
    checkpoints: dict[str, Checkpoint],
    family: str,
    rows: int,
    dtype: torch.dtype,
    calls: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = load(checkpoints[family].folder, dtype=dtype)
    logits = decode(model, rows)
    # The first token only made the plans of the blocks.
    assert calls == [10, 11, 12, 13, 14]
    assert torch.equal(logits, by_blocks(monkeypatch, lambda: decode(model, rows)))
    assert len(calls) == 5


@pytest.mark.parametrize("family", WHOLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_decoded_together_get_the_bits_of_each_alone(
    checkpoints: dict[str, Checkpoint], family: str, dtype: torch.dtype, calls: list[int]
) -> None:
    model = load(checkpoints[family].folder, dtype=dtype)
    alone = decode_in_parts(model, [1] * 90)
    calls.clear()
    # Within the room of the cache and beyond it: a buffer has room for 64 tokens more than it holds.
    together = decode_in_parts(model, [2, 8, 1, 7, 3, 8, 8, 8, 8, 8, 8, 8, 8, 5])
    assert calls == [9, 11, 19, 20, 27, 30, 38, 46, 54, 62, 70, 78, 86, 94]
    assert torch.equal(together, alone)


def test_tokens_taken_back_leave_no_trace(checkpoints: dict[str, Checkpoint], calls: list[int]) -> None:
    model = load(checkpoints["llama"].folder)
    expected = decode(model)

    def try_others(model: PreTrainedModel, cache: DynamicCache) -> None:
        model(IDS[:1, :5], past_key_values=cache)
        cache.crop(-5)

    assert torch.equal(decode(model, between=try_others), expected)
    assert calls[-4:] == [12, 12, 13, 14]


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_blocks_that_see_different_tokens_are_computed_one_by_one(
    checkpoints: dict[str, Checkpoint], family: str, calls: list[int]
) -> None:
    folder, dense = checkpoints[family]
    assert_close(decode(load(folder)), decode(dense), 1e-4)
    assert not calls


def test_window_unknown_to_the_cache_is_respected(checkpoints: dict[str, Checkpoint], calls: list[int]) -> None:
    folder, dense = checkpoints["mistral"]
    logits = []
    with torch.no_grad():
        for model in (load(folder), dense):
            cache = DynamicCache()
            model(IDS, past_key_values=cache)
            logits.append(torch.cat([model(IDS[:, i : i + 1], past_key_values=cache).logits for i in range(5)]))
    fused, expected = logits
    assert_close(fused, expected, 1e-4)
    assert not calls


def _crop(model: PreTrainedModel, cache: DynamicCache) -> None:
    cache.crop(-2)


def _reorder(model: PreTrainedModel, cache: DynamicCache) -> None:
    cache.reorder_cache(torch.LongTensor([1, 1]))


def _prompt_again(model: PreTrainedModel, cache: DynamicCache) -> None:
    model(IDS[:2, :4], past_key_values=cache)


def _copy_layers(model: PreTrainedModel, cache: DynamicCache) -> None:
    cache.layers[:] = copy.deepcopy(cache.layers)


def _look(model: PreTrainedModel, cache: DynamicCache) -> None:
    layers = [layer for layer in cache.layers if isinstance(layer, RoomLayer)]
    assert len(layers) == len(cache.layers)
    assert {layer.keys.shape[2] for layer in layers} == {cache.get_seq_length()} == {12}


def _watch_inside(model: PreTrainedModel, cache: DynamicCache) -> None:
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *arguments: arguments[-1] + 1)


def _watch_a_block(model: PreTrainedModel, cache: DynamicCache) -> None:
    model.model.layers[0].register_forward_hook(lambda *arguments: arguments[-1] * 2)


def _patch_a_block(model: PreTrainedModel, cache: DynamicCache) -> None:
    forward = model.model.layers[1].forward
    model.model.layers[1].forward = lambda hidden, *args, **kwargs: forward(hidden, *args, **kwargs) + 1


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
def test_changes_between_tokens_take_effect(
    checkpoints: dict[str, Checkpoint], between: Between, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoints["llama"].folder
    logits = decode(load(folder), 2, between=between)
    assert calls[:2] == [10, 11]
    expected = by_blocks(monkeypatch, lambda: decode(load(folder), 2, between=None if between is _look else between))
    assert_close(logits, expected, 1e-5)
    if between not in (_copy_layers, _look):
        assert (logits - decode(load(folder), 2)).abs().max() > 1e-4


def test_hidden_states_come_from_every_block(checkpoints: dict[str, Checkpoint], calls: list[int]) -> None:
    model = load(checkpoints["llama"].folder)
    logits = decode(model)
    states: list[Any] = []

    def record(model: PreTrainedModel, cache: DynamicCache) -> None:
        states.append(model(IDS[:1, :1], past_key_values=cache, output_hidden_states=True).hidden_states)
        cache.crop(-1)

    assert_close(decode(model, between=record), logits, 1e-5)
    (hidden_states,) = states
    assert len(hidden_states) == model.config.num_hidden_layers + 1
    assert all(not torch.equal(*pair) for pair in itertools.pairwise(hidden_states))


def test_block_called_directly_computes_itself(checkpoints: dict[str, Checkpoint], calls: list[int]) -> None:
    model = load(checkpoints["llama"].folder)
    decode(model)
    calls.clear()
    block, hidden = model.model.layers[0], torch.randn(1, 1, model.config.hidden_size)
    with torch.no_grad():
        positions = model.model.rotary_emb(hidden, position_ids=torch.tensor([[3]]))
        output = block(hidden, position_embeddings=positions)
        next_output = model.model.layers[1](output, position_embeddings=positions)
    assert not calls
    assert not torch.equal(output, next_output)
    assert current_pass() is None


def test_all_blocks_are_visible_while_they_run(checkpoints: dict[str, Checkpoint]) -> None:
    model = load(checkpoints["llama"].folder)
    decode(model)
    layers, views = model.model.layers, []

    def look(*_: Any) -> None:
        blocks = model.model.layers
        views.append((len(blocks), blocks[1], list(blocks), [name for name, _ in blocks.named_children()]))

    # The hooks run before the first block, and after all of them are computed.
    for module in (model.model.embed_tokens, model.model.norm):
        module.register_forward_hook(look)
    decode(model, tokens=2)
    assert isinstance(layers, torch.nn.ModuleList)
    assert model.model.layers is layers
    assert views == [(2, layers[1], list(layers), ["0", "1"])] * 6


def test_threads_do_not_interfere(checkpoints: dict[str, Checkpoint]) -> None:
    model = load(checkpoints["llama"].folder)
    expected = [decode(model, rows, 12) for rows in (1, 2, 3)]
    logits: dict[int, Tensor] = {}

    def work(rows: int) -> None:
        for _ in range(4):
            logits[rows] = decode(model, rows, 12)

    threads = [threading.Thread(target=work, args=(rows,)) for rows in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(logits[rows], alone) for rows, alone in enumerate(expected, 1))


def test_fused_model_looks_like_the_original(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
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
