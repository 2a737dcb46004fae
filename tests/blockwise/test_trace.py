"""Running a model block by block from a trace gives what the model gives, or the model is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, UNUSUAL, save_tiny
from torch import Tensor, nn

from shiftadd_cli.blockwise.calls import Spilled, leaves
from shiftadd_cli.blockwise.model import BlockwiseModel
from shiftadd_cli.blockwise.trace import Trace, trace_model
from shiftadd_cli.errors import SourceError
from shiftadd_cli.source import Source, Structure, find_structure, open_source

WINDOWS = torch.randint(3, 320, (5, 40), generator=torch.Generator().manual_seed(0))


def opened(family: str, folder: Path) -> tuple[Source, Structure]:
    save_tiny(family, folder)
    source = open_source(str(folder))
    structure = find_structure(source.skeleton())
    source.materialise(structure.outside)
    return source, structure


@pytest.mark.parametrize("family", [*FAMILIES, *UNUSUAL])
def test_blocks_run_one_by_one_give_the_hidden_states_of_the_model(tmp_path: Path, family: str) -> None:
    source, structure = opened(family, tmp_path)
    # Five windows in batches of two: the last batch has its own size, and its own arguments for ALiBi and masks.
    trace = trace_model(BlockwiseModel(source, structure), WINDOWS, 2)
    assert sorted(trace.calls) == [0, 1, 2]
    model = source.load_model(torch.float32)
    expected: dict[str, Tensor] = {}
    for name in structure.blocks:
        model.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: expected.update({name: out[0] if isinstance(out, tuple) else out})
        )
    with torch.no_grad():
        model(input_ids=WINDOWS, use_cache=False)
    for depth, name in enumerate(structure.blocks):
        assert all(parameter.is_meta for parameter in source.skeleton().get_submodule(name).parameters())
        source.materialise([name])
        block = source.skeleton().get_submodule(name)
        with torch.no_grad():
            for index, batch in enumerate(trace.hidden):
                trace.hidden.replace(index, trace.calls[index][depth].run(block, batch))
        source.release([name])
        form = trace.passage.states[depth + 1]
        hidden = torch.cat([form.unpack(batch)[0] for batch in trace.hidden], form.layout.batch)
        torch.testing.assert_close(hidden, expected[name], rtol=1e-4, atol=1e-5)


def spilled(trace: Trace) -> dict[int, set[tuple[Any, ...]]]:
    """Paths of the arguments that are stored in a file, by batch."""
    return {
        index: {
            path[1:]
            for call in calls
            for path, leaf in leaves({"args": call.args, "kwargs": call.kwargs})
            if isinstance(leaf, Spilled)
        }
        for index, calls in trace.calls.items()
    }


def test_arguments_that_depend_on_tokens_are_stored_for_each_batch_and_others_once(tmp_path: Path) -> None:
    source, structure = opened("gemma4", tmp_path)
    trace = trace_model(BlockwiseModel(source, structure), WINDOWS[:4], 2, spill=tmp_path)
    # The inputs of each layer, which are the first positional argument.
    assert spilled(trace) == {0: set(), 1: {(0,)}}
    masks = [call.kwargs["attention_mask"] for calls in trace.calls.values() for call in calls]
    assert len({id(mask) for mask in masks if mask is not None}) <= 2, "one for each kind of attention"


def test_masks_and_positions_are_not_stored_for_each_batch(tmp_path: Path) -> None:
    source, structure = opened("llama", tmp_path)
    assert spilled(trace_model(BlockwiseModel(source, structure), WINDOWS, 2)) == {0: set(), 1: set(), 2: set()}


def test_a_process_records_the_batches_it_runs(tmp_path: Path) -> None:
    source, structure = opened("llama", tmp_path)
    trace = trace_model(BlockwiseModel(source, structure), WINDOWS, 2, batches=iter([1]))
    assert list(trace.calls) == [1]
    assert len(trace.hidden) == 3


def add_hook(source: Source, structure: Structure, depth: int, hook: Callable[..., Any], **options: Any) -> None:
    source.skeleton().get_submodule(structure.blocks[depth]).register_forward_pre_hook(hook, **options)


def test_a_model_that_changes_hidden_states_between_blocks_is_refused(tmp_path: Path) -> None:
    source, structure = opened("llama", tmp_path)
    # As in a model with something between its blocks, the output of one block is not the input of the next.
    add_hook(source, structure, 1, lambda _, args: (args[0] * 2, *args[1:]))
    with pytest.raises(SourceError, match=f"changes the hidden states before {structure.blocks[1]}"):
        trace_model(BlockwiseModel(source, structure), torch.zeros(1, 4, dtype=torch.long), 1)


def test_an_argument_computed_from_block_outputs_is_refused_by_name(tmp_path: Path) -> None:
    source, structure = opened("llama", tmp_path)

    def from_hidden(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "attention_mask": args[0].mean() + torch.zeros(1, 1, 40, 40)}

    add_hook(source, structure, 1, from_hidden, with_kwargs=True)
    with pytest.raises(SourceError, match=rf"argument attention_mask of {structure.blocks[1]} depends on the outputs"):
        trace_model(BlockwiseModel(source, structure), WINDOWS, 2)


def test_a_block_that_remembers_its_last_run_is_refused_by_name(tmp_path: Path) -> None:
    source, structure = opened("llama", tmp_path)
    block = source.skeleton().get_submodule(structure.blocks[1])
    compute = block.forward
    runs: list[int] = []

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        runs.append(len(runs))
        return compute(hidden, *args, **kwargs) * len(runs)

    block.forward = forward
    with pytest.raises(SourceError, match=f"output of {structure.blocks[1]} differs by .* run one by one"):
        trace_model(BlockwiseModel(source, structure), WINDOWS, 2)


def test_a_block_that_is_called_twice_is_refused(tmp_path: Path) -> None:
    source, structure = opened("llama", tmp_path)
    first, second = (source.skeleton().get_submodule(name) for name in structure.blocks)
    second.forward = lambda *args, **kwargs: first(*args, **kwargs)
    with pytest.raises(SourceError, match=f"{structure.blocks[0]} more than once"):
        trace_model(BlockwiseModel(source, structure), WINDOWS, 2)


def test_a_head_that_mixes_tokens_is_refused(tmp_path: Path) -> None:
    source, structure = opened("llama", tmp_path)
    source.skeleton().model.norm = Shifting(source.skeleton().model.norm)
    with pytest.raises(SourceError, match="output of the head differs"):
        trace_model(BlockwiseModel(source, structure), WINDOWS, 2)


class Shifting(nn.Module):
    """A norm that shifts its input by one token."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden.roll(1, 1))


def test_a_model_that_uses_the_weight_of_a_linear_directly_is_refused_by_name(tmp_path: Path) -> None:
    source, structure = opened("llama", tmp_path)
    block: Any = source.skeleton().get_submodule(structure.blocks[0])
    compute = block.forward

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return compute(hidden, *args, **kwargs) + block.mlp.up_proj.weight.mT.sum()

    block.forward = forward
    with pytest.raises(
        SourceError, match=r"weight of model\.layers\.0\.mlp\.up_proj itself.*`skip='\*\.mlp\.up_proj'`"
    ):
        trace_model(BlockwiseModel(source, structure), WINDOWS, 2)
