"""Token weights against a plain backward pass through the whole model in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny_models import FAMILIES, save_tiny, tiny_config
from transformers import AutoModelForCausalLM

from shiftadd_cli.blockwise.model import BlockwiseModel
from shiftadd_cli.blockwise.trace import trace_model
from shiftadd_cli.calibration import end_loss
from shiftadd_cli.calibration.gradients import squared_gradients
from shiftadd_cli.errors import NumericalError
from shiftadd_cli.source import find_structure, open_source
from shiftadd_cli.source.experts import split_experts

CPU = torch.device("cpu")


def random_windows(samples=5, seq_len=20, vocab_size=256):
    return torch.randint(0, vocab_size, (samples, seq_len), generator=torch.Generator().manual_seed(1))


def prepare(path, windows, batch_size=2):
    source = open_source(str(path))
    structure = find_structure(source.skeleton())
    source.materialise(structure.outside)
    return source, structure, trace_model(BlockwiseModel(source, structure), windows, batch_size)


def weights_of(path, windows, batch_size=2, **options):
    source, structure, trace = prepare(path, windows, batch_size)
    return squared_gradients(BlockwiseModel(source, structure), windows, trace, **options).token_weights()


def plain_forward(path, windows):
    """Logits and every linear's output, all in one graph, in float64."""
    source = open_source(str(path))
    model = source.load_model(torch.float64)
    split_experts(model)
    outputs = {}
    for spec in find_structure(source.skeleton()).linears:
        model.get_submodule(spec.name).register_forward_hook(
            lambda _, __, out, name=spec.name: outputs.update({name: out})
        )
    # Something must ask for gradients, since no parameter does.
    model.get_input_embeddings().register_forward_hook(lambda _, __, out: out.requires_grad_())
    return model(input_ids=windows, use_cache=False).logits, outputs


def squared(gradients, outputs, shape):
    """Each token's mean square over features, divided by the mean over tokens."""
    means = {name: each.square().mean(-1) for name, each in zip(outputs, gradients, strict=True)}
    # OPT runs some linears on rows of all windows' tokens.
    means = {name: each.view(shape) for name, each in means.items()}
    return {name: (each / each.mean()).float() for name, each in means.items()}


def text_reference(path, windows):
    logits, outputs = plain_forward(path, windows)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    return squared(torch.autograd.grad(loss, list(outputs.values())), outputs, windows.shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_cross_entropy_weights_equal_those_of_a_plain_backward_pass(tmp_path, family):
    save_tiny(family, tmp_path)
    windows = random_windows()
    found = weights_of(tmp_path, windows, loss="cross_entropy")
    wanted = text_reference(tmp_path, windows)
    assert sorted(found) == sorted(wanted)
    for name, weights in found.items():
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights, wanted[name], rtol=2e-3, atol=1e-5)


def test_what_a_model_does_to_its_logits_counts(tmp_path):
    config = tiny_config("gemma3")
    config.final_logit_softcapping = 0.5
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    windows = random_windows()
    found = weights_of(tmp_path, windows, loss="cross_entropy")
    wanted = text_reference(tmp_path, windows)
    for name, weights in found.items():
        torch.testing.assert_close(weights, wanted[name], rtol=2e-3, atol=1e-5)


@pytest.fixture
def tiny_vocabulary(tmp_path):
    """A model of twelve tokens, whose predictions can be enumerated."""
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


def test_drawn_labels_give_the_fisher_information_in_expectation(tiny_vocabulary):
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
    found = weights_of(tiny_vocabulary, window.expand(draws, -1), batch_size=500)
    for name, weights in found.items():
        wanted = (exact[name] / exact[name].mean()).float()
        error = weights.std(0) / draws**0.5
        # The first token's query and key meet nothing but each other: no gradient, but for rounding.
        assert ((weights.mean(0) - wanted).abs() < 5 * error + 1e-6).all()
        assert (error[1:] < 0.1 * wanted[1:]).all()


def test_labels_depend_on_the_seed_only(tmp_path):
    save_tiny("llama", tmp_path)
    windows = random_windows()
    first, again, other = (weights_of(tmp_path, windows, seed=seed) for seed in (3, 3, 4))
    for name, weights in first.items():
        assert torch.equal(weights, again[name])
        assert not torch.allclose(weights, other[name], rtol=0.01)


@pytest.mark.parametrize("loss", ["divergence", "cross_entropy"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_weights_do_not_depend_on_batches_groups_or_slices(tmp_path, loss, batch_size, monkeypatch):
    save_tiny("opt", tmp_path)
    windows = random_windows()
    wanted = weights_of(tmp_path, windows, batch_size=2, loss=loss)
    # One batch a group, and slices of seven tokens.
    monkeypatch.setattr(end_loss, "_SLICE_BYTES", 7 * 320 * 16)
    source, structure, trace = prepare(tmp_path, windows, batch_size)
    rows = []
    source.skeleton().get_output_embeddings().register_forward_hook(lambda _, args, __: rows.append(args[0].shape[:-1]))
    found = squared_gradients(
        BlockwiseModel(source, structure), windows, trace, loss=loss, memory_bytes=1
    ).token_weights()
    assert max(rows) == (1, 7)
    for name, weights in found.items():
        torch.testing.assert_close(weights, wanted[name], rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_means_are_those_of_a_plain_backward_pass(tmp_path, family):
    save_tiny(family, tmp_path)
    windows = random_windows()
    source, structure, trace = prepare(tmp_path, windows)
    found = squared_gradients(BlockwiseModel(source, structure), windows, trace, loss="cross_entropy")
    logits, outputs = plain_forward(tmp_path, windows)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten(), reduction="sum")
    gradients = torch.autograd.grad(loss, list(outputs.values()))
    assert sorted(found.means) == sorted(outputs)
    for name, gradient in zip(outputs, gradients, strict=True):
        assert found.means[name] == pytest.approx(float(gradient.square().mean()), rel=2e-3)
        assert float(found.tokens[name].mean()) == pytest.approx(found.means[name])


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_have_means_over_all_predictions_and_no_weights_of_tokens(tmp_path, family):
    save_tiny(family, tmp_path)
    windows = random_windows(2, 20)
    source, structure, trace = prepare(tmp_path, windows)
    found = squared_gradients(BlockwiseModel(source, structure), windows, trace, loss="cross_entropy")
    logits, outputs = plain_forward(tmp_path, windows)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten(), reduction="sum")
    gradients = torch.autograd.grad(loss, list(outputs.values()))
    experts = {spec.name for spec in structure.linears if spec.experts is not None}
    assert found.means.keys() == {spec.name for spec in structure.linears} == outputs.keys()
    for name, gradient in zip(outputs, gradients, strict=True):
        expected = float(gradient.square().mean(-1).sum()) / windows.numel()
        assert found.means[name] == pytest.approx(expected, rel=5e-3, abs=1e-12)
    assert found.tokens.keys() == found.token_weights().keys() == outputs.keys() - experts
    assert found.partial == experts


def test_tokens_that_a_linear_does_not_see_count_as_nothing_in_its_mean(tmp_path):
    save_tiny("llama", tmp_path)
    windows = random_windows(2, 8)
    source, structure, trace = prepare(tmp_path, windows)
    mlp = source.skeleton().get_submodule("model.layers.0.mlp")
    seen = []

    def experts(hidden):
        gate = mlp.gate_proj(hidden[:, :3])
        if gate.requires_grad:
            gate.register_hook(seen.append)
        return mlp.down_proj(hidden.mean(-1, keepdim=True) + gate.mean(1, keepdim=True) + 0 * mlp.up_proj(hidden))

    mlp.forward = experts
    found = squared_gradients(BlockwiseModel(source, structure), windows, trace)
    name = "model.layers.0.mlp.gate_proj"
    assert found.partial == {name}
    (gradient,) = seen
    assert found.means[name] == pytest.approx(float(gradient.square().mean(-1).sum()) / windows.numel())


def test_the_trace_stays_as_it_is(tmp_path):
    save_tiny("gpt2", tmp_path)
    windows = random_windows()
    source, structure, trace = prepare(tmp_path, windows)
    before = [batch.clone() for batch in trace.hidden]
    squared_gradients(BlockwiseModel(source, structure), windows, trace).token_weights()
    for batch, kept in zip(trace.hidden, before, strict=True):
        assert torch.equal(batch, kept)
        assert not batch.requires_grad


def test_one_block_is_in_memory_at_a_time_and_each_group_of_batches_reads_it_twice(tmp_path, monkeypatch):
    save_tiny("qwen3", tmp_path)
    windows = random_windows(6, 16)
    source, structure, trace = prepare(tmp_path, windows)
    blocks = [source.skeleton().get_submodule(name) for name in structure.blocks]
    read = []

    def materialise(names):
        assert all(each.is_meta for block in blocks for each in block.parameters())
        read.extend(names)
        type(source).materialise(source, names)

    monkeypatch.setattr(source, "materialise", materialise)
    # Room for two of the three batches.
    room = 2 * len(blocks) * next(iter(trace.hidden)).nbytes
    squared_gradients(BlockwiseModel(source, structure), windows, trace, memory_bytes=room).token_weights()
    assert read == 2 * [*structure.blocks, *reversed(structure.blocks)]
    assert all(each.is_meta for block in blocks for each in block.parameters())
    assert not any("forward" in vars(block) for block in blocks)


def test_linears_without_a_gradient_for_every_token_weigh_all_alike(tmp_path):
    save_tiny("llama", tmp_path)
    windows = random_windows(2, 8)
    source, structure, trace = prepare(tmp_path, windows, batch_size=1)
    turn = itertools.count()
    mlp = source.skeleton().get_submodule("model.layers.0.mlp")

    def experts(hidden):
        """One linear sees all tokens of the first batch and three of the second, one is computed for nothing."""
        gate = mlp.gate_proj(hidden[:, : 3 if next(turn) % 2 else None]).tanh().mean(1, keepdim=True)
        return mlp.down_proj(gate + hidden.mean(-1, keepdim=True) + 0 * mlp.up_proj(hidden))

    mlp.forward = experts
    found = squared_gradients(BlockwiseModel(source, structure), windows, trace).token_weights()
    uniform = {name for name, weights in found.items() if torch.equal(weights, torch.ones(2, 8))}
    assert uniform == {"model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"}


def test_a_gradient_that_is_not_finite_is_refused_by_name(tmp_path):
    save_tiny("llama", tmp_path)
    windows = random_windows()
    source, structure, trace = prepare(tmp_path, windows)

    def overflow(_, __, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient / 0)

    source.skeleton().get_submodule(f"{structure.blocks[1]}.mlp.act_fn").register_forward_hook(overflow)
    with pytest.raises(NumericalError, match=rf"input of {structure.blocks[1]} is not finite in float32"):
        squared_gradients(BlockwiseModel(source, structure), windows, trace).token_weights()


def test_windows_must_be_those_of_the_trace(tmp_path):
    save_tiny("llama", tmp_path)
    source, structure, trace = prepare(tmp_path, random_windows(2, 8))
    with pytest.raises(ValueError, match="of 2 samples, not of 3"):
        squared_gradients(BlockwiseModel(source, structure), random_windows(3, 8), trace).token_weights()
