"""Second moments of linears' inputs against a float64 sum over what a plain forward pass feeds them."""

from __future__ import annotations

import pytest
import torch
from tiny_models import save_tiny

from shiftadd_cli.calibration.hessian import gather_moments
from shiftadd_cli.calibration.trace import trace_model
from shiftadd_cli.source import find_structure, open_source


def moments_of(path, windows, batch_size, depth=0):
    source = open_source(str(path))
    structure = find_structure(source.skeleton())
    source.materialise(structure.outside)
    trace = trace_model(source, structure, windows, batch_size, torch.device("cpu"))
    source.materialise([structure.blocks[depth]])
    model = source.skeleton()
    linears = [(spec.name, model.get_submodule(spec.name)) for spec in structure.linears if spec.block == depth]
    block = model.get_submodule(structure.blocks[depth])
    shared = gather_moments(block, linears, trace.hidden, trace.calls, depth, torch.device("cpu"))
    return source, structure, shared


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("batch_size", [2, 5])
def test_moments_equal_those_of_a_plain_forward_pass(tmp_path, family, batch_size):
    save_tiny(family, tmp_path)
    windows = torch.randint(0, 256, (5, 16), generator=torch.Generator().manual_seed(1))
    source, structure, shared = moments_of(tmp_path, windows, batch_size)
    model = source.load_model(torch.float32)
    inputs = {}
    for spec in structure.linears:
        if spec.block == 0:
            module = model.get_submodule(spec.name)
            module.register_forward_pre_hook(lambda _, args, name=spec.name: inputs.update({name: args[0].detach()}))
    model(input_ids=windows)
    assert sorted(name for each in shared for name in each.names) == sorted(inputs)
    for each in shared:
        for name in each.names:
            rows = inputs[name].double().reshape(-1, inputs[name].shape[-1])
            torch.testing.assert_close(each.hessian.double(), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)


def test_linears_that_read_one_tensor_share_its_moment(tmp_path):
    save_tiny("llama", tmp_path)
    _, _, shared = moments_of(tmp_path, torch.zeros(2, 8, dtype=torch.long), 2)
    kinds = [tuple(name.rpartition(".")[2] for name in each.names) for each in shared]
    assert kinds == [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]


def test_a_linear_that_never_runs_has_no_moment(tmp_path):
    save_tiny("llama", tmp_path)
    source = open_source(str(tmp_path))
    structure = find_structure(source.skeleton())
    source.materialise(structure.outside)
    trace = trace_model(source, structure, torch.zeros(2, 8, dtype=torch.long), 2, torch.device("cpu"))
    source.materialise([structure.blocks[0]])
    block = source.skeleton().get_submodule(structure.blocks[0])
    idle = torch.nn.Linear(3, 3)
    shared = gather_moments(block, [("idle", idle)], trace.hidden, trace.calls, 0, torch.device("cpu"))
    assert [(each.names, each.hessian) for each in shared] == [(("idle",), None)]
