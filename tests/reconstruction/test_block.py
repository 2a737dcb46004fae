"""Reconstruction of a block of a tiny model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from block_streams import block_stream
from tiny_models import save_tiny

from shiftadd_cli.blockwise.block_runner import BlockStream
from shiftadd_cli.blockwise.hidden_states import HiddenStates
from shiftadd_cli.pipeline.account import PhaseClock
from shiftadd_cli.pipeline.block import BlockQuantizer
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.reconstruction import block as module
from shiftadd_cli.reconstruction.block import Reconstruction, reconstruct_block

CPU = torch.device("cpu")


@dataclass
class Case:
    stream: BlockStream
    original: BlockStream
    quantizer: BlockQuantizer

    @property
    def targets(self) -> HiddenStates:
        return self.original.hidden

    def original_matrix(self, kind: str) -> torch.Tensor:
        weight = self.original.block.get_parameter(f"{kind}.weight")
        return weight.T if self.quantizer.specs[kind].transposed else weight

    def reconstruct(self, epochs: int = 4, seed: int = 0) -> Reconstruction:
        quantizer = self.quantizer
        return reconstruct_block(
            self.stream,
            self.targets,
            {kind: solution.weight for kind, solution in quantizer.solutions.items()},
            {kind: self.original_matrix(kind) for kind in quantizer.solutions},
            [kind for kind, spec in quantizer.specs.items() if spec.transposed],
            epochs=epochs,
            seed=seed,
        )


def quantized_block(path: Path, family: str = "llama", bits: int = 2) -> Case:
    save_tiny(family, path)
    windows = torch.randint(0, 256, (96, 64), generator=torch.Generator().manual_seed(1))
    stream, specs = block_stream(path, windows, 8)
    original = BlockStream("block", copy.deepcopy(stream.block), copy.deepcopy(stream.hidden), stream.calls)
    recipe = Recipe.load("best", {"bits": bits, "group_size": 16, "samples": 96, "seq_len": 64})
    quantizer = BlockQuantizer(stream.block, specs, recipe, PhaseClock())
    quantizer.on(stream)
    original.advance()
    return Case(stream, original, quantizer)


def relative_error(case: Case, batches: Sequence[int]) -> float:
    """Mean over tokens of ‖y − ŷ‖² / ‖y‖², float64."""
    errors = []
    for index in batches:
        hidden, target = case.stream.hidden[index], case.targets[index].double()
        with torch.no_grad():
            output = case.stream.calls[index].run(case.stream.block, hidden).double()
        errors.append(((output - target).square().sum(-1) / target.square().sum(-1)).mean())
    return float(sum(errors) / len(errors))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma3"])
def test_reconstruction_lowers_the_error_on_held_out_text(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A block with a few dozen columns depends on every weight, so its codes take smaller steps.
    monkeypatch.setattr(module, "_LATENT_RATE", 0.003)
    case = quantized_block(tmp_path, family)
    before = relative_error(case, [11])
    state = {name: tensor.clone() for name, tensor in case.stream.block.state_dict().items()}
    result = case.reconstruct()
    assert all(torch.equal(tensor, state[name]) for name, tensor in case.stream.block.state_dict().items())
    assert result.error_before == pytest.approx(before, rel=1e-3)
    assert result.kept
    assert result.error_after < 0.97 * result.error_before
    # The returned tensors give the measured error.
    block = case.stream.block
    for kind, weight in result.weights.items():
        decoded = weight.decode()
        block.get_submodule(kind).weight.data = decoded.T if case.quantizer.specs[kind].transposed else decoded
    for name, value in result.parameters.items():
        block.get_parameter(name).data = value
    assert relative_error(case, [11]) == pytest.approx(result.error_after, rel=1e-3)


def test_reconstruction_that_raises_the_error_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LATENT_RATE", 10.0)
    result = quantized_block(tmp_path).reconstruct(epochs=1)
    assert result.error_after > result.error_before
    assert not result.kept
    assert result.parameters == {}


def test_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    case = quantized_block(tmp_path)
    first, second, other = (case.reconstruct(epochs=2, seed=seed) for seed in (0, 0, 1))
    for kind, weight in first.weights.items():
        for name, tensor in weight.tensors.items():
            assert torch.equal(tensor, second.weights[kind].tensors[name])
    assert first.error_after != other.error_after


def test_token_with_huge_hidden_states_does_not_dominate(tmp_path: Path) -> None:
    """Errors are relative to the size of each token, so that one of 64 tokens adds at most its share."""
    case = quantized_block(tmp_path)
    plain = case.reconstruct(epochs=1).error_before
    for index in range(len(case.targets)):
        target = case.targets[index].clone()
        target[:, 0] *= 1000
        case.targets.replace(index, target)
    huge = case.reconstruct(epochs=1).error_before
    assert huge == pytest.approx(plain, abs=1.1 / 64)
