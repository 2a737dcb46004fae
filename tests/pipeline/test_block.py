"""The calibration data of each linear of a block, against manual forward passes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from block_streams import block_stream
from tiny_models import save_tiny
from torch import Tensor, nn

from shiftadd_cli.bcq.options import SolverOptions
from shiftadd_cli.bcq.solver import Solution
from shiftadd_cli.blockwise.block_runner import BlockStream
from shiftadd_cli.blockwise.input_cache import InputCache
from shiftadd_cli.blockwise.tensor_file import TensorFile
from shiftadd_cli.distributed.team import ALONE, Team
from shiftadd_cli.pipeline import block as block_module
from shiftadd_cli.pipeline.account import PhaseClock
from shiftadd_cli.pipeline.block import BlockQuantizer
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.source import LinearSpec

CPU = torch.device("cpu")
Moments = dict[str, tuple[Tensor | None, Tensor | None, Tensor | None]]
WINDOWS = torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(1))


def first_block(path: Path, family: str = "llama") -> tuple[BlockStream, list[LinearSpec]]:
    path.mkdir(exist_ok=True)
    save_tiny(family, path)
    return block_stream(path, WINDOWS, 6)


def behind(stream: BlockStream) -> BlockStream:
    """The original of a block. In the block itself, noise stands in for the errors of earlier blocks from now on."""
    original = BlockStream("block", copy.deepcopy(stream.block), copy.deepcopy(stream.hidden), stream.calls)
    noise = torch.randn(stream.hidden[0].shape, generator=torch.Generator().manual_seed(0))
    stream.hidden.replace(0, stream.hidden[0] + 0.3 * noise * stream.hidden[0].std())
    return original


def recipe(**fields: Any) -> Recipe:
    return Recipe.load("default", {"bits": 2, "group_size": 16, "rotation": "none"} | fields)


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> Moments:
    """The Hessian, the cross moment and the drift that each linear is solved with, by name."""
    moments: Moments = {}
    real = block_module.quantize_matrices

    def spy(
        weights: Sequence[Tensor],
        names: Sequence[str],
        hessian: Tensor | None,
        options: SolverOptions,
        cross: Tensor | None = None,
        team: Team = ALONE,
        drift: Tensor | None = None,
    ) -> list[Solution]:
        moments.update(dict.fromkeys(names, (hessian, cross, drift)))
        return real(weights, names, hessian, options, cross, team, drift)

    monkeypatch.setattr(block_module, "quantize_matrices", spy)
    return moments


def read_by(block: nn.Module, stream: BlockStream, kind: str) -> Tensor:
    """Float64 rows that the linear reads in a plain forward pass."""
    rows: list[Tensor] = []

    def record(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        rows.append(arguments[0].double())

    handle = block.get_submodule(kind).register_forward_pre_hook(record)
    with torch.no_grad():
        stream.calls[0].run(block, stream.hidden[0])
    handle.remove()
    return rows[0].reshape(-1, rows[0].shape[-1])


def second_moment(rows: Tensor) -> Tensor:
    return (rows.T @ rows / len(rows)).float()


@pytest.mark.parametrize("true_sequential", [True, False])
def test_true_sequential_linears_read_quantized_predecessors(
    tmp_path: Path, solved: Moments, true_sequential: bool
) -> None:
    stream, specs = first_block(tmp_path)
    untouched = copy.deepcopy(stream.block)
    BlockQuantizer(stream.block, specs, recipe(true_sequential=true_sequential), PhaseClock()).on(stream)
    for kind in ("self_attn.o_proj", "mlp.down_proj"):
        hessian, cross, drift = solved[next(spec.name for spec in specs if spec.kind == kind)]
        assert cross is None
        assert drift is None
        assert hessian is not None
        # The block is fully quantized by now. Linears that run later do not change the input of this one.
        expected, other = (stream.block, untouched) if true_sequential else (untouched, stream.block)
        torch.testing.assert_close(hessian, second_moment(read_by(expected, stream, kind)), rtol=1e-3, atol=1e-5)
        assert not torch.allclose(hessian, second_moment(read_by(other, stream, kind)), rtol=1e-3, atol=1e-5)


def test_asymmetric_linears_aim_at_the_original(tmp_path: Path, solved: Moments) -> None:
    stream, specs = first_block(tmp_path)
    original = BlockStream("block", copy.deepcopy(stream.block), copy.deepcopy(stream.hidden), stream.calls)
    quantizer = BlockQuantizer(stream.block, specs, recipe(asymmetric=1.0, drift=0.0), PhaseClock())
    quantizer.on(stream, InputCache(original, TensorFile(tmp_path)))
    for spec in specs:
        now, before = read_by(stream.block, stream, spec.kind), read_by(original.block, stream, spec.kind)
        _, cross, _ = solved[spec.name]
        torch.testing.assert_close(cross, (before.T @ now / len(now)).float(), rtol=1e-3, atol=1e-5)


def test_asymmetric_calibration_brings_the_block_closer_to_the_original(tmp_path: Path) -> None:
    errors = {}
    for strength in (0.0, 1.0):
        stream, specs = first_block(tmp_path / str(strength))
        original = behind(stream)
        fields = {"bits": 4, "asymmetric": strength, "weight_error": 0.001}
        quantizer = BlockQuantizer(stream.block, specs, recipe(**fields), PhaseClock())
        quantizer.on(stream, InputCache(original, TensorFile()))
        stream.advance()
        errors[strength] = (stream.hidden[0] - original.hidden[0]).square().sum()
    assert errors[1.0] < errors[0.0]


def test_drift_is_that_of_the_hidden_states_that_the_output_is_added_to(tmp_path: Path, solved: Moments) -> None:
    stream, specs = first_block(tmp_path)
    original = behind(stream)
    names = {spec.kind: spec.name for spec in specs}
    in_order = [kind for group in stream.shared_inputs(list(names)) for kind in group]
    start, unquantized = original.hidden[0], copy.deepcopy(stream.block)
    quantizer = BlockQuantizer(stream.block, specs, recipe(drift=1.0), PhaseClock())
    quantizer.on(stream, InputCache(original, TensorFile(tmp_path)))
    # The original's states have advanced to its outputs.
    original.hidden.replace(0, start)
    for kind, reader in {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": None}.items():
        block = copy.deepcopy(stream.block)
        # The linear itself and those that run later were not quantized yet.
        for later in in_order[in_order.index(kind) :]:
            block.get_submodule(later).load_state_dict(unquantized.get_submodule(later).state_dict())
        x = read_by(block, stream, kind)
        if reader is None:
            before = original.calls[0].run(original.block, start).double()
            after = stream.calls[0].run(block, stream.hidden[0]).double()
        else:
            before, after = read_by(original.block, original, reader), read_by(block, stream, reader)
        moment = (before - after).reshape(-1, before.shape[-1]).detach().T @ x / len(x)
        _, cross, drift = solved[names[kind]]
        assert cross is None
        torch.testing.assert_close(drift, moment.float(), rtol=1e-3, atol=1e-5)
    _, cross, drift = solved[names["mlp.gate_proj"]]
    assert cross is not None
    assert drift is None


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layers_correct_the_drift_of_the_hidden_states(tmp_path: Path, family: str) -> None:
    errors = {}
    for strength in (0.0, 1.0):
        stream, specs = first_block(tmp_path / str(strength), family)
        original = behind(stream)
        fields = {"bits": 8, "asymmetric": 1.0, "drift": strength}
        quantizer = BlockQuantizer(stream.block, specs, recipe(**fields), PhaseClock())
        quantizer.on(stream, InputCache(original, TensorFile()))
        stream.advance()
        errors[strength] = (stream.hidden[0] - original.hidden[0]).square().sum()
    assert errors[1.0] < 0.98 * errors[0.0]


def test_linears_that_share_an_input_keep_their_own_bits(tmp_path: Path) -> None:
    """Rows are independent, so each linear matches the solution in which all linears have its bits."""
    solutions = {}
    mixed_bits = {"self_attn.q_proj": 2, "self_attn.k_proj": 3, "self_attn.v_proj": 2}
    choices: list[int | dict[str, int]] = [2, 3, mixed_bits]
    for choice in choices:
        stream, specs = first_block(tmp_path)
        layer_bits = {spec.name: choice if isinstance(choice, int) else choice.get(spec.kind, 3) for spec in specs}
        quantizer = BlockQuantizer(stream.block, specs, recipe(), PhaseClock(), bits=layer_bits)
        quantizer.on(stream)
        solutions[str(choice)] = quantizer.solutions
    *uniform, mixed = solutions.values()
    for kind, bits in mixed_bits.items():
        own, other = uniform[bits - 2][kind], mixed[kind]
        assert other.weight.layout.bits == bits
        torch.testing.assert_close(other.weight.decode(), own.weight.decode())
        assert other.output_error == pytest.approx(own.output_error, rel=1e-4)


def test_block_computes_with_the_decoded_weights(tmp_path: Path) -> None:
    for family in ("llama", "gpt2"):
        stream, specs = first_block(tmp_path / family, family)
        quantizer = BlockQuantizer(stream.block, specs, recipe(), PhaseClock())
        quantizer.without_data()
        for spec in specs:
            weight = stream.block.get_parameter(f"{spec.kind}.weight")
            decoded = quantizer.solutions[spec.kind].weight.decode()
            assert torch.equal(weight, decoded.T if spec.transposed else decoded)
            assert quantizer.solutions[spec.kind].output_error is None


def squared_output_errors(tmp_path: Path, **fields: Any) -> dict[str, tuple[float, float]]:
    """Mean of ‖(Wx + b) − (Ŵx + b̂)‖² over the calibration inputs, and norm of the mean difference, by linear."""
    stream, specs = first_block(tmp_path, "opt")
    untouched = copy.deepcopy(stream.block)
    inputs = {spec.kind: read_by(untouched, stream, spec.kind) for spec in specs}
    quantizer = BlockQuantizer(stream.block, specs, recipe(true_sequential=False, **fields), PhaseClock())
    quantizer.on(stream)
    errors = {}
    for kind, rows in inputs.items():
        before, after = untouched.get_submodule(kind).double(), stream.block.get_submodule(kind).double()
        with torch.no_grad():
            difference = before(rows) - after(rows)
        errors[kind] = float(difference.square().sum(-1).mean()), float(difference.mean(0).norm())
    return errors


def test_biases_absorb_the_mean_error(tmp_path: Path) -> None:
    plain = squared_output_errors(tmp_path / "plain", bias_correction=False)
    corrected = squared_output_errors(tmp_path / "corrected")
    for kind, (error, mean) in corrected.items():
        assert mean < 1e-5 < plain[kind][1]
        assert error < plain[kind][0]


def test_biases_absorb_the_mean_drift(tmp_path: Path) -> None:
    stream, specs = first_block(tmp_path, "gpt2")
    original = BlockStream("block", copy.deepcopy(stream.block), copy.deepcopy(stream.hidden), stream.calls)
    stream.hidden.replace(0, 1.1 * stream.hidden[0] + 0.2)
    quantizer = BlockQuantizer(stream.block, specs, recipe(drift=1.0), PhaseClock())
    quantizer.on(stream, InputCache(original, TensorFile(tmp_path)))
    stream.advance()
    gap = (stream.hidden[0] - original.hidden[0]).mean((0, 1))
    assert gap.norm() < 1e-4 * original.hidden[0].mean((0, 1)).norm()


def test_biases_absorb_the_mean_error_of_asymmetric_calibration(tmp_path: Path) -> None:
    stream, specs = first_block(tmp_path, "opt")
    original = BlockStream("block", copy.deepcopy(stream.block), copy.deepcopy(stream.hidden), stream.calls)
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


def test_bias_correction_changes_nothing_without_biases(tmp_path: Path) -> None:
    states = []
    for name, correct in (("a", True), ("b", False)):
        stream, specs = first_block(tmp_path / name)
        BlockQuantizer(stream.block, specs, recipe(bias_correction=correct), PhaseClock()).on(stream)
        states.append(stream.block.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
