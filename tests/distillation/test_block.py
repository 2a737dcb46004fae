"""A tuned block against the dense block that its tensors, as written, stand for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny
from torch import Tensor
from torch.func import functional_call

from shiftadd_cli.bcq.weight import QuantizedWeight
from shiftadd_cli.blockwise.model import BlockwiseModel
from shiftadd_cli.blockwise.trace import trace_model
from shiftadd_cli.distillation.block import TunedBlock
from shiftadd_cli.pipeline.account import PhaseClock
from shiftadd_cli.pipeline.block import BlockQuantizer
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.source import find_structure, open_source

CPU = torch.device("cpu")
FAMILIES = ("llama", "qwen2", "gpt2", "opt", "bloom", "gemma3", "mixtral", "gpt_oss")


class Case:
    """Block 0 of a tiny model, quantized and released from memory; `stored` has its tensors as an artifact does."""

    def __init__(self, path: Path, family: str, **fields: Any) -> None:
        source = open_source(str(save_tiny(family, path)))
        structure = find_structure(source.skeleton())
        source.materialise(structure.outside)
        windows = torch.randint(0, 256, (4, 20), generator=torch.Generator().manual_seed(1))
        trace = trace_model(BlockwiseModel(source, structure), windows, 4)
        self.hidden, self.call = trace.hidden[0], trace.calls[0][0]
        self.name = structure.blocks[0]
        self.module = source.skeleton().get_submodule(self.name)
        source.materialise([self.name])
        recipe = Recipe.load("fast", {"group_size": 16, "bits": 3} | fields)
        specs = [spec for spec in structure.linears if spec.block == 0]
        quantizer = BlockQuantizer(self.module, specs, recipe, PhaseClock())
        quantizer.without_data()
        self.specs = quantizer.specs
        self.layouts = {kind: solution.weight.layout for kind, solution in quantizer.solutions.items()}
        self.stored = {f"{self.name}.{path}": parameter.clone() for path, parameter in self.module.named_parameters()}
        for kind, solution in quantizer.solutions.items():
            del self.stored[f"{self.name}.{kind}.weight"]
            self.stored |= {
                f"{self.name}.{kind}.{suffix}": tensor for suffix, tensor in solution.weight.tensors.items()
            }
        source.release([self.name])
        source.materialise([f"{self.name}.{path}" for path, _ in self.module.named_buffers()])
        linears = [(spec, self.layouts[kind]) for kind, spec in self.specs.items()]
        self.block = TunedBlock(self.name, self.module, linears, self.stored.__getitem__, CPU)

    def dense(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The block's parameters, decoded from stored tensors."""
        parameters = {}
        for path, _ in self.module.named_parameters():
            kind = path.removesuffix(".weight")
            if kind in self.layouts:
                tensors = {suffix: stored[f"{self.name}.{kind}.{suffix}"] for suffix in self.layouts[kind].tensors()}
                parameters[path] = self.specs[kind].turned(QuantizedWeight(self.layouts[kind], tensors).decode())
            else:
                parameters[path] = stored[f"{self.name}.{path}"]
        return parameters

    def run_dense(self, parameters: dict[str, Tensor]) -> Tensor:
        return self.call.run(lambda *args, **named: functional_call(self.module, parameters, args, named), self.hidden)

    def disturb(self) -> None:
        """Change the values of all tunable parameters."""
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in self.block.parameters():
                parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator)).add_(0.01)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fields", [{}, {"primitive": "shift2"}, {"row_scale": False, "rotation": "none"}], ids=str)
def test_block_computes_what_its_written_tensors_stand_for(tmp_path: Path, family: str, fields: dict[str, Any]) -> None:
    case = Case(tmp_path, family, **fields)
    decoded = case.block.decoded()
    with torch.no_grad():
        before = case.block.run(case.call, case.hidden, decoded)
        torch.testing.assert_close(before, case.run_dense(case.dense(case.stored)), rtol=1e-4, atol=1e-4)
        case.disturb()
        after = case.block.run(case.call, case.hidden, decoded)
        written = case.block.tensors()
        torch.testing.assert_close(after, case.run_dense(case.dense(case.stored | written)), rtol=1e-4, atol=1e-4)
    assert (after - before).abs().max() > 0.01
    assert all((tensor.shape, tensor.dtype) == (case.stored[name].shape, case.stored[name].dtype)
               for name, tensor in written.items())  # fmt: skip
    scales = [name for name in written if name.endswith("weight_row_scale")]
    assert len(scales) == (0 if fields.get("row_scale") is False else len(case.layouts))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_match_those_of_scaled_rows_and_vectors(tmp_path: Path, family: str) -> None:
    """Against automatic differentiation through the dense matrices, where a factor multiplies rows of the weight."""
    case = Case(tmp_path, family)
    case.disturb()
    decoded = case.block.decoded()
    with torch.no_grad():
        output = case.block.run(case.call, case.hidden, decoded)
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    entering = case.block.backward(case.call, case.hidden, gradient, decoded)

    # The block computes with the rounded factors.
    rounded = {
        kind: (case.block.tensors()[f"{case.name}.{kind}.weight_row_scale"].float()
               / case.stored[f"{case.name}.{kind}.weight_row_scale"].float()).requires_grad_()
        for kind in case.block.factors
    }  # fmt: skip
    vectors = {path: vector.detach().clone().requires_grad_() for path, vector in case.block.vectors.free.items()}
    hidden = case.hidden.clone().requires_grad_()
    parameters = dict(decoded) | vectors
    for kind, factor in rounded.items():
        weight = case.specs[kind].turned(parameters[f"{kind}.weight"])
        parameters[f"{kind}.weight"] = case.specs[kind].turned(weight * factor[:, None])
    case.call.run(
        lambda *args, **named: functional_call(case.module, parameters, args, named), hidden
    ).backward(gradient)  # fmt: skip
    torch.testing.assert_close(entering, hidden.grad, rtol=1e-3, atol=1e-4)
    for kind, factor in rounded.items():
        torch.testing.assert_close(case.block.factors[kind].grad, factor.grad, rtol=1e-3, atol=1e-3)
    for path, vector in vectors.items():
        torch.testing.assert_close(case.block.vectors.free[path].grad, vector.grad, rtol=1e-3, atol=1e-3)


def test_row_of_zeros_stays_zero(tmp_path: Path) -> None:
    case = Case(tmp_path, "llama")
    name = f"{case.name}.mlp.up_proj.weight_row_scale"
    case.stored[name][3] = 0
    linears = [(spec, case.layouts[kind]) for kind, spec in case.specs.items()]
    block = TunedBlock(case.name, case.module, linears, case.stored.__getitem__, CPU)
    gradient = torch.ones_like(case.hidden)
    block.backward(case.call, case.hidden, gradient, block.decoded())
    factor_gradient = block.factors["mlp.up_proj"].grad
    assert factor_gradient is not None
    assert torch.isfinite(factor_gradient).all()
    assert block.tensors()[name][3] == 0
