"""Token weights against a plain backward pass through the whole model in float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, save_tiny, tiny_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from shiftadd_cli.blockwise.model import BlockwiseModel
from shiftadd_cli.blockwise.trace import Trace, trace_model
from shiftadd_cli.calibration import end_loss
from shiftadd_cli.calibration.end_loss import Loss
from shiftadd_cli.calibration.gradients import squared_gradients
from shiftadd_cli.errors import NumericalError
from shiftadd_cli.source import Source, Structure, find_structure, open_source
from shiftadd_cli.source.experts import split_experts


def random_windows(samples: int = 5, seq_len: int = 20, vocab_size: int = 256) -> Tensor:
    return torch.randint(0, vocab_size, (samples, seq_len), generator=torch.Generator().manual_seed(1))


def prepare(path: Path, windows: Tensor, batch_size: int = 2) -> tuple[Source, Structure, Trace]:
    source = open_source(str(path))
    structure = find_structure(source.skeleton())
    source.materialise(structure.outside)
    return source, structure, trace_model(BlockwiseModel(source, structure), windows, batch_size)


def weights_of(path: Path, windows: Tensor, batch_size: int = 2, **options: Any) -> dict[str, Tensor]:
    source, structure, trace = prepare(path, windows, batch_size)
    return squared_gradients(BlockwiseModel(source, structure), windows, trace, **options).token_weights()


def plain_forward(path: Path, windows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and every linear's output, all in one graph, in float64."""
    source = open_source(str(path))
    model = source.load_model(torch.float64)
    split_experts(model)
    outputs: dict[str, Tensor] = {}
    for spec in find_structure(source.skeleton()).linears:
        model.get_submodule(spec.name).register_forward_hook(
            lambda _, __, out, name=spec.name: outputs.update({name: out})
        )
    # No parameter requires a gradient, so the embeddings must.
    model.get_input_embeddings().register_forward_hook(lambda _, __, out: out.requires_grad_())
    return model(input_ids=windows, use_cache=False).logits, outputs


def squared(gradients: Sequence[Tensor], outputs: Iterable[str], shape: torch.Size) -> dict[str, Tensor]:
    """Each token's mean square over features, divided by the mean over tokens."""
    means = {name: gradient.square().mean(-1) for name, gradient in zip(outputs, gradients, strict=True)}
    # OPT flattens the windows into rows of tokens for some linears.
    means = {name: mean.view(shape) for name, mean in means.items()}
    return {name: (mean / mean.mean()).float() for name, mean in means.items()}


def text_reference(path: Path, windows: Tensor) -> dict[str, Tensor]:
    logits, outputs = plain_forward(path, windows)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    return squared(torch.autograd.grad(loss, list(outputs.values())), outputs, windows.shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_cross_entropy_weights_equal_those_of_a_plain_backward_pass(tmp_path: Path, family: str) -> None:
    save_tiny(family, tmp_path)
    windows = random_windows()
    weights_by_name = weights_of(tmp_path, windows, loss="cross_entropy")
    expected = text_reference(tmp_path, windows)
    assert sorted(weights_by_name) == sorted(expected)
    for name, weights in weights_by_name.items():
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights, expected[name], rtol=2e-3, atol=1e-5)


def test_softcapping_of_logits_is_taken_into_account(tmp_path: Path) -> None:
    config = tiny_config("gemma3")
    config.final_logit_softcapping = 0.5
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    windows = random_windows()
    weights_by_name = weights_of(tmp_path, windows, loss="cross_entropy")
    expected = text_reference(tmp_path, windows)
    for name, weights in weights_by_name.items():
        torch.testing.assert_close(weights, expected[name], rtol=2e-3, atol=1e-5)


@pytest.fixture
def tiny_vocabulary(tmp_path: Path) -> Path:
    """A model with a vocabulary of twelve tokens, whose predictions can be enumerated."""
    config = tiny_config("llama")
    config.vocab_size = 12
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(tmp_path)
    return tmp_path


def test_drawn_labels_give_the_fisher_information_in_expectation(tiny_vocabulary: Path) -> None:
    window = random_windows(1, 6, 12)
    logits, outputs = plain_forward(tiny_vocabulary, window)
    log_probabilities = logits.log_softmax(-1)[0]
    exact = {name: torch.zeros(6, dtype=torch.float64) for name in outputs}
    # Labels at different positions are independent and their scores have mean zero: squares add over positions.
    for row in log_probabilities:
        for value in row:
            gradients = torch.autograd.grad(value, list(outputs.values()), retain_graph=True)
            for name, gradient in zip(outputs, gradients, strict=True):
                exact[name] += value.exp().detach() * gradient[0].square().mean(-1)
    draws = 4000
    weights_by_name = weights_of(tiny_vocabulary, window.expand(draws, -1), batch_size=500)
    for name, weights in weights_by_name.items():
        expected = (exact[name] / exact[name].mean()).float()
        error = weights.std(0) / draws**0.5
        # The first token attends only to itself, so its query and key have no gradient, except for rounding.
        assert ((weights.mean(0) - expected).abs() < 5 * error + 1e-6).all()
        assert (error[1:] < 0.1 * expected[1:]).all()


def test_labels_depend_only_on_the_seed(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    windows = random_windows()
    first, again, other = (weights_of(tmp_path, windows, seed=seed) for seed in (3, 3, 4))
    for name, weights in first.items():
        assert torch.equal(weights, again[name])
        assert not torch.allclose(weights, other[name], rtol=0.01)


@pytest.mark.parametrize("loss", ["divergence", "cross_entropy"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_weights_do_not_depend_on_batches_groups_or_slices(
    tmp_path: Path, loss: Loss, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("opt", tmp_path)
    windows = random_windows()
    expected = weights_of(tmp_path, windows, batch_size=2, loss=loss)
    # Groups of one batch, and slices of seven tokens.
    monkeypatch.setattr(end_loss, "_SLICE_BYTES", 7 * 320 * 16)
    source, structure, trace = prepare(tmp_path, windows, batch_size)
    rows: list[torch.Size] = []
    source.skeleton().get_output_embeddings().register_forward_hook(lambda _, args, __: rows.append(args[0].shape[:-1]))
    weights_by_name = squared_gradients(
        BlockwiseModel(source, structure), windows, trace, loss=loss, memory_bytes=1
    ).token_weights()
    assert max(rows) == (1, 7)
    for name, weights in weights_by_name.items():
        torch.testing.assert_close(weights, expected[name], rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_means_are_those_of_a_plain_backward_pass(tmp_path: Path, family: str) -> None:
    save_tiny(family, tmp_path)
    windows = random_windows()
    source, structure, trace = prepare(tmp_path, windows)
    squares = squared_gradients(BlockwiseModel(source, structure), windows, trace, loss="cross_entropy")
    logits, outputs = plain_forward(tmp_path, windows)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten(), reduction="sum")
    gradients = torch.autograd.grad(loss, list(outputs.values()))
    assert sorted(squares.means) == sorted(outputs)
    for name, gradient in zip(outputs, gradients, strict=True):
        assert squares.means[name] == pytest.approx(float(gradient.square().mean()), rel=2e-3)
        assert float(squares.tokens[name].mean()) == pytest.approx(squares.means[name])


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_have_means_over_all_predictions_and_no_token_weights(tmp_path: Path, family: str) -> None:
    save_tiny(family, tmp_path)
    windows = random_windows(2, 20)
    source, structure, trace = prepare(tmp_path, windows)
    squares = squared_gradients(BlockwiseModel(source, structure), windows, trace, loss="cross_entropy")
    logits, outputs = plain_forward(tmp_path, windows)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten(), reduction="sum")
    gradients = torch.autograd.grad(loss, list(outputs.values()))
    experts = {spec.name for spec in structure.linears if spec.experts is not None}
    assert squares.means.keys() == {spec.name for spec in structure.linears} == outputs.keys()
    for name, gradient in zip(outputs, gradients, strict=True):
        expected = float(gradient.square().mean(-1).sum()) / windows.numel()
        assert squares.means[name] == pytest.approx(expected, rel=5e-3, abs=1e-12)
    assert squares.tokens.keys() == squares.token_weights().keys() == outputs.keys() - experts
    assert squares.partial == experts


def test_tokens_that_a_linear_does_not_see_count_as_zero_in_its_mean(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    windows = random_windows(2, 8)
    source, structure, trace = prepare(tmp_path, windows)
    mlp: Any = source.skeleton().get_submodule("model.layers.0.mlp")
    gradients: list[Tensor] = []

    def experts(hidden: Tensor) -> Tensor:
        gate = mlp.gate_proj(hidden[:, :3])
        if gate.requires_grad:
            gate.register_hook(gradients.append)
        return mlp.down_proj(hidden.mean(-1, keepdim=True) + gate.mean(1, keepdim=True) + 0 * mlp.up_proj(hidden))

    mlp.forward = experts
    squares = squared_gradients(BlockwiseModel(source, structure), windows, trace)
    name = "model.layers.0.mlp.gate_proj"
    assert squares.partial == {name}
    (gradient,) = gradients
    assert squares.means[name] == pytest.approx(float(gradient.square().mean(-1).sum()) / windows.numel())


def test_the_trace_is_not_changed(tmp_path: Path) -> None:
    save_tiny("gpt2", tmp_path)
    windows = random_windows()
    source, structure, trace = prepare(tmp_path, windows)
    originals = [batch.clone() for batch in trace.hidden]
    squared_gradients(BlockwiseModel(source, structure), windows, trace).token_weights()
    for batch, original in zip(trace.hidden, originals, strict=True):
        assert torch.equal(batch, original)
        assert not batch.requires_grad


def test_one_block_is_loaded_at_a_time_and_twice_per_group_of_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("qwen3", tmp_path)
    windows = random_windows(6, 16)
    source, structure, trace = prepare(tmp_path, windows)
    blocks = [source.skeleton().get_submodule(name) for name in structure.blocks]
    loaded: list[str] = []

    def materialise(names: Sequence[str]) -> None:
        assert all(parameter.is_meta for block in blocks for parameter in block.parameters())
        loaded.extend(names)
        type(source).materialise(source, names)

    monkeypatch.setattr(source, "materialise", materialise)
    # Room for two of the three batches.
    room = 2 * len(blocks) * next(iter(trace.hidden)).nbytes
    squared_gradients(BlockwiseModel(source, structure), windows, trace, memory_bytes=room).token_weights()
    assert loaded == 2 * [*structure.blocks, *reversed(structure.blocks)]
    assert all(parameter.is_meta for block in blocks for parameter in block.parameters())
    assert not any("forward" in vars(block) for block in blocks)


def test_linears_without_a_gradient_for_every_token_weight_tokens_equally(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    windows = random_windows(2, 8)
    source, structure, trace = prepare(tmp_path, windows, batch_size=1)
    turn = itertools.count()
    mlp: Any = source.skeleton().get_submodule("model.layers.0.mlp")

    def experts(hidden: Tensor) -> Tensor:
        """One linear sees all tokens of the first batch and three of the second, another is computed without effect."""
        gate = mlp.gate_proj(hidden[:, : 3 if next(turn) % 2 else None]).tanh().mean(1, keepdim=True)
        return mlp.down_proj(gate + hidden.mean(-1, keepdim=True) + 0 * mlp.up_proj(hidden))

    mlp.forward = experts
    weights_by_name = squared_gradients(BlockwiseModel(source, structure), windows, trace).token_weights()
    uniform = {name for name, weights in weights_by_name.items() if torch.equal(weights, torch.ones(2, 8))}
    assert uniform == {"model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"}


def test_a_gradient_that_is_not_finite_is_refused_by_name(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    windows = random_windows()
    source, structure, trace = prepare(tmp_path, windows)

    def overflow(_: nn.Module, __: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient / 0)

    source.skeleton().get_submodule(f"{structure.blocks[1]}.mlp.act_fn").register_forward_hook(overflow)
    with pytest.raises(NumericalError, match=rf"input of {structure.blocks[1]} is not finite in float32"):
        squared_gradients(BlockwiseModel(source, structure), windows, trace).token_weights()


def test_windows_must_be_those_of_the_trace(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    source, structure, trace = prepare(tmp_path, random_windows(2, 8))
    with pytest.raises(ValueError, match="of 2 samples, not of 3"):
        squared_gradients(BlockwiseModel(source, structure), random_windows(3, 8), trace).token_weights()
