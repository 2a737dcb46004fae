"""Running a model block by block from a trace gives what the model gives."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, save_tiny

from shiftadd_cli.calibration.trace import trace_model
from shiftadd_cli.errors import SourceError
from shiftadd_cli.source import find_structure, open_source

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_run_one_by_one_give_the_hidden_states_of_the_model(tmp_path, family):
    save_tiny(family, tmp_path)
    source = open_source(str(tmp_path))
    structure = find_structure(source.skeleton())
    # Five windows in batches of two: the last batch has a size, and for ALiBi and masks arguments, of its own.
    windows = torch.randint(0, 256, (5, 40), generator=torch.Generator().manual_seed(0))
    source.materialise(structure.outside)
    trace = trace_model(source, structure, windows, 2, CPU)
    assert sorted(trace.calls) == [0, 1, 2]
    model = source.load_model(torch.float32)
    wanted = {}
    for name in structure.blocks:
        model.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: wanted.update({name: out[0] if isinstance(out, tuple) else out})
        )
    with torch.no_grad():
        model(input_ids=windows, use_cache=False)
    for depth, name in enumerate(structure.blocks):
        assert all(each.is_meta for each in source.skeleton().get_submodule(name).parameters())
        source.materialise([name])
        block = source.skeleton().get_submodule(name)
        with torch.no_grad():
            for index, batch in enumerate(trace.hidden):
                trace.hidden.replace(index, trace.calls[index][depth].run(block, batch))
        source.release([name])
        torch.testing.assert_close(torch.cat(list(trace.hidden)), wanted[name], rtol=1e-4, atol=1e-5)


def test_a_model_that_changes_hidden_states_between_blocks_is_refused(tmp_path):
    save_tiny("llama", tmp_path)
    source = open_source(str(tmp_path))
    structure = find_structure(source.skeleton())
    source.materialise(structure.outside)
    # A model with something between its blocks, seen from the blocks: what leaves one is not what enters the next.
    second = source.skeleton().get_submodule(structure.blocks[1])
    second.register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))
    with pytest.raises(SourceError, match=f"changes the hidden states before {structure.blocks[1]}"):
        trace_model(source, structure, torch.zeros(1, 4, dtype=torch.long), 1, CPU)
