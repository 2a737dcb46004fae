"""What each linear of a block is calibrated on, against forward passes by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import save_tiny

from shiftadd_cli.blockwise.block_runner import BlockStream
from shiftadd_cli.blockwise.input_cache import InputCache
from shiftadd_cli.blockwise.model import BlockwiseModel
from shiftadd_cli.blockwise.tensor_file import TensorFile
from shiftadd_cli.blockwise.trace import trace_model
from shiftadd_cli.distributed.team import ALONE
from shiftadd_cli.pipeline import block as block_module
from shiftadd_cli.pipeline.account import PhaseClock
from shiftadd_cli.pipeline.block import BlockQuantizer
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.source import find_structure, open_source

CPU = torch.device("cpu")
WINDOWS = torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(1))


def first_block(path, family="llama"):
    path.mkdir(exist_ok=True)
    save_tiny(family, path)
    source = open_source(str(path))
    structure = find_structure(source.skeleton())
    source.materialise(structure.outside)
    trace = trace_model(BlockwiseModel(source, structure), WINDOWS, 6)
    source.materialise([structure.blocks[0]])
    block = source.skeleton().get_submodule(structure.blocks[0])
    calls = {index: each[0] for index, each in trace.calls.items()}
    return BlockStream("block", block, trace.hidden, calls), [spec for spec in structure.linears if spec.block == 0]


def recipe(**fields):
    return Recipe.load("default", {"bits": 2, "group_size": 16, "rotation": "none"} | fields)


@pytest.fixture
def solved(monkeypatch):
    """Hessian and cross moment that each linear is solved with, by name."""
    seen = {}
    real = block_module.quantize_matrices

    def spy(weights, names, hessian, options, cross=None, team=ALONE):
        seen.update(dict.fromkeys(names, (hessian, cross)))
        return real(weights, names, hessian, options, cross, team)

    monkeypatch.setattr(block_module, "quantize_matrices", spy)
    return seen


def read_by(block, stream, kind):
    """Rows the linear reads in a plain pass, float64."""
    rows = []
    handle = block.get_submodule(kind).register_forward_pre_hook(lambda _, args: rows.append(args[0].double()))
    with torch.no_grad():
        stream.calls[0].run(block, stream.hidden[0])
    handle.remove()
    return rows[0].reshape(-1, rows[0].shape[-1])


def second_moment(rows):
    return (rows.T @ rows / len(rows)).float()


@pytest.mark.parametrize("true_sequential", [True, False])
def test_true_sequential_linears_see_the_quantized_ones_before_them(tmp_path, solved, true_sequential):
    stream, specs = first_block(tmp_path)
    untouched = copy.deepcopy(stream.block)
    BlockQuantizer(stream.block, specs, recipe(true_sequential=true_sequential), PhaseClock()).on(stream)
    for kind in ("self_attn.o_proj", "mlp.down_proj"):
        hessian, cross = solved[next(spec.name for spec in specs if spec.kind == kind)]
        assert cross is None
        # The block is quantized by now, and what runs after a linear does not change what it reads.
        seen, other = (stream.block, untouched) if true_sequential else (untouched, stream.block)
        torch.testing.assert_close(hessian, second_moment(read_by(seen, stream, kind)), rtol=1e-3, atol=1e-5)
        assert not torch.allclose(hessian, second_moment(read_by(other, stream, kind)), rtol=1e-3, atol=1e-5)


def test_asymmetric_linears_aim_at_the_original(tmp_path, solved):
    stream, specs = first_block(tmp_path)
    original = BlockStream("block", copy.deepcopy(stream.block), stream.hidden.copy(), stream.calls)
    quantizer = BlockQuantizer(stream.block, specs, recipe(asymmetric=1.0), PhaseClock())
    quantizer.on(stream, InputCache(original, TensorFile(tmp_path)))
    for spec in specs:
        now, before = read_by(stream.block, stream, spec.kind), read_by(original.block, stream, spec.kind)
        _, cross = solved[spec.name]
        torch.testing.assert_close(cross, (before.T @ now / len(now)).float(), rtol=1e-3, atol=1e-5)


def test_asymmetric_calibration_brings_the_block_nearer_to_the_original(tmp_path):
    errors = {}
    for strength in (0.0, 1.0):
        stream, specs = first_block(tmp_path / str(strength))
        original = BlockStream("block", copy.deepcopy(stream.block), stream.hidden.copy(), stream.calls)
        # Layers before have spoilt what the block reads.
        noise = torch.randn(stream.hidden[0].shape, generator=torch.Generator().manual_seed(0))
        stream.hidden.replace(0, stream.hidden[0] + 0.3 * noise * stream.hidden[0].std())
        fields = {"bits": 4, "asymmetric": strength, "weight_error": 0.001}
        quantizer = BlockQuantizer(stream.block, specs, recipe(**fields), PhaseClock())
        quantizer.on(stream, InputCache(original, TensorFile()))
        stream.advance()
        errors[strength] = (stream.hidden[0] - original.hidden[0]).square().sum()
    assert errors[1.0] < errors[0.0]


def test_linears_of_one_input_are_solved_with_bits_of_their_own(tmp_path):
    """Rows do not depend on each other, so each comes out as it does where all have its bits."""
    solutions = {}
    for bits in (2, 3, {"self_attn.q_proj": 2, "self_attn.k_proj": 3, "self_attn.v_proj": 2}):
        stream, specs = first_block(tmp_path)
        given = {spec.name: bits if isinstance(bits, int) else bits.get(spec.kind, 3) for spec in specs}
        quantizer = BlockQuantizer(stream.block, specs, recipe(), PhaseClock(), bits=given)
        quantizer.on(stream)
        solutions[str(bits)] = quantizer.solutions
    *uniform, mixed = solutions.values()
    for kind, bits in (("self_attn.q_proj", 2), ("self_attn.k_proj", 3), ("self_attn.v_proj", 2)):
        own, other = uniform[bits - 2][kind], mixed[kind]
        assert other.weight.layout.bits == bits
        torch.testing.assert_close(other.weight.decode(), own.weight.decode())
        assert other.output_error == pytest.approx(own.output_error, rel=1e-4)


def test_the_block_computes_with_the_decoded_weights(tmp_path):
    for family in ("llama", "gpt2"):
        stream, specs = first_block(tmp_path / family, family)
        quantizer = BlockQuantizer(stream.block, specs, recipe(), PhaseClock())
        quantizer.without_data()
        for spec in specs:
            weight = stream.block.get_submodule(spec.kind).weight
            decoded = quantizer.solutions[spec.kind].weight.decode()
            assert torch.equal(weight, decoded.T if spec.transposed else decoded)
            assert quantizer.solutions[spec.kind].output_error is None


def squared_output_errors(tmp_path, **fields):
    """Mean over the calibration inputs of ‖(Wx + b) − (Ŵx + b̂)‖² and of the size of its mean, by kind of linear."""
    stream, specs = first_block(tmp_path, "opt")
    untouched = copy.deepcopy(stream.block)
    inputs = {spec.kind: read_by(untouched, stream, spec.kind) for spec in specs}
    quantizer = BlockQuantizer(stream.block, specs, recipe(true_sequential=False, **fields), PhaseClock())
    quantizer.on(stream)
    found = {}
    for kind, rows in inputs.items():
        before, after = untouched.get_submodule(kind).double(), stream.block.get_submodule(kind).double()
        with torch.no_grad():
            difference = before(rows) - after(rows)
        found[kind] = float(difference.square().sum(-1).mean()), float(difference.mean(0).norm())
    return found


def test_biases_take_over_the_mean_of_the_error(tmp_path):
    plain = squared_output_errors(tmp_path / "plain", bias_correction=False)
    corrected = squared_output_errors(tmp_path / "corrected")
    for kind, (error, mean) in corrected.items():
        assert mean < 1e-5 < plain[kind][1]
        assert error < plain[kind][0]


def test_biases_take_over_the_mean_of_what_asymmetric_calibration_aims_at(tmp_path):
    stream, specs = first_block(tmp_path, "opt")
    original = BlockStream("block", copy.deepcopy(stream.block), stream.hidden.copy(), stream.calls)
    stream.hidden.replace(0, 1.1 * stream.hidden[0] + 0.2)
    before = {spec.kind: read_by(original.block, original, spec.kind) for spec in specs}
    quantizer = BlockQuantizer(stream.block, specs, recipe(asymmetric=1.0), PhaseClock())
    quantizer.on(stream, InputCache(original, TensorFile(tmp_path)))
    now = {spec.kind: read_by(stream.block, stream, spec.kind) for spec in specs}
    for spec in specs:
        first, last = original.block.get_submodule(spec.kind).double(), stream.block.get_submodule(spec.kind).double()
        with torch.no_grad():
            error = (first(before[spec.kind]) - last(now[spec.kind])).mean(0)
        assert error.norm() < 1e-4 * first(before[spec.kind]).mean(0).norm()


def test_without_biases_their_correction_changes_nothing(tmp_path):
    states = []
    for name, correct in (("a", True), ("b", False)):
        stream, specs = first_block(tmp_path / name)
        BlockQuantizer(stream.block, specs, recipe(bias_correction=correct), PhaseClock()).on(stream)
        states.append(stream.block.state_dict())
    assert all(torch.equal(each, states[1][name]) for name, each in states[0].items())
