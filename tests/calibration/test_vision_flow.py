"""Vision models walked through block by block, forwards and backwards, against the whole model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_vision import VISION_FAMILIES, save_tiny_vision, write_processor
from torch import Tensor, nn

from shiftadd_cli.blockwise.calls import hidden_of
from shiftadd_cli.blockwise.flow import Flow, measure_flow
from shiftadd_cli.blockwise.forward import predict
from shiftadd_cli.blockwise.model import BlockwiseModel
from shiftadd_cli.blockwise.probe_model import ProbeModel
from shiftadd_cli.blockwise.trace import Trace, trace_model
from shiftadd_cli.calibration.end_loss import EndLoss
from shiftadd_cli.calibration.gradients import squared_gradients
from shiftadd_cli.errors import SourceError
from shiftadd_cli.source import Source, Structure, find_structure, open_source

PIXELS = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def traced(family: str, folder: Path, batch_size: int = 2) -> tuple[Source, Structure, Trace, Flow]:
    source = open_source(str(save_tiny_vision(family, folder)))
    structure = find_structure(source.skeleton())
    flow = measure_flow(source, structure.blocks, 0)
    source.materialise(structure.outside)
    return source, structure, trace_model(BlockwiseModel(source, structure), PIXELS, batch_size), flow


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_blocks_run_one_by_one_give_the_hidden_states_of_the_model(family: str, tmp_path: Path) -> None:
    source, structure, trace, flow = traced(family, tmp_path)
    expected: dict[str, Tensor] = {}
    first = trace.hidden[0].shape
    model = source.load_model(torch.float32)
    for name in structure.blocks:
        model.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: expected.update({name: hidden_of(output)})
        )
    with torch.no_grad():
        predict(model, PIXELS)
    for depth, name in enumerate(structure.blocks):
        assert trace.hidden[0].shape[1] == flow.tokens[depth]
        source.materialise([name])
        block = source.skeleton().get_submodule(name)
        with torch.no_grad():
            for index, batch in enumerate(trace.hidden):
                trace.hidden.replace(index, trace.calls[index][depth].run(block, batch))
        source.release([name])
        torch.testing.assert_close(torch.cat(list(trace.hidden)), expected[name], rtol=1e-4, atol=1e-5)
        assert trace.forms[depth].shape == expected[name].shape[1:]
    inputs = [first, *(expected[name].shape for name in structure.blocks[:-1])]
    assert flow.values == max(shape[1] * shape[2] for shape in inputs)
    assert flow.sample_bytes == PIXELS[0].nbytes


@pytest.mark.parametrize("family", ["vit", "swin", "clip-projection"])
def test_divergences_are_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    source, structure, _, _ = traced(family, tmp_path)
    replay = ProbeModel(BlockwiseModel(source, structure), PIXELS, 2)
    noise = 0.1 * torch.randn(replay.hidden.shape, generator=torch.Generator().manual_seed(2))

    def run_to_the_end(hidden: Tensor) -> Tensor:
        for depth in range(len(structure.blocks)):
            replay.model.load(depth)
            hidden = replay.run(depth, hidden)
            replay.model.release(depth)
        return hidden

    original, other = (run_to_the_end(hidden) for hidden in (replay.hidden, replay.hidden + noise))
    same, divergence = replay.divergences(original, [original, other])
    model = source.load_model(torch.float32)

    def disturb(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        rest = dict(kwargs)
        hidden = args[0] if args else rest.pop("hidden_states")
        return (hidden + noise, *args[1:]), rest

    with torch.no_grad():
        reference = predict(model, PIXELS)
        model.get_submodule(structure.blocks[0]).register_forward_pre_hook(disturb, with_kwargs=True)
        disturbed = predict(model, PIXELS)
    one, two = reference.values.double(), disturbed.values.double()
    if reference.is_logits:
        one, two = one.log_softmax(-1), two.log_softmax(-1)
        expected = (one.exp() * (one - two)).sum(-1).mean()
    else:
        expected = (1 - torch.cosine_similarity(one, two, dim=-1)).mean()
    assert same == 0
    assert expected > 1e-5
    assert divergence == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("family", ["vit", "swin", "clip"])
def test_squared_gradients_are_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    """The slope at the predictions is taken from `EndLoss` by handing it the outputs of the last block."""
    source, structure, trace, _ = traced(family, tmp_path)
    result = squared_gradients(BlockwiseModel(source, structure), PIXELS, trace, seed=3)
    model = source.load_model(torch.float32).requires_grad_(False)
    outputs: dict[str, Tensor] = {}
    last: list[Tensor] = []

    def keep(name: str) -> Callable[..., None]:
        return lambda _, __, output: outputs.update({name: output})

    for spec in structure.linears:
        model.get_submodule(spec.name).register_forward_hook(keep(spec.name))
    first = model.get_submodule(structure.blocks[0])
    first.register_forward_pre_hook(
        lambda _, args, kwargs: ((args[0].requires_grad_(), *args[1:]), kwargs), with_kwargs=True
    )
    model.get_submodule(structure.blocks[-1]).register_forward_hook(
        lambda _, __, output: last.append(hidden_of(output))
    )
    predict(model, PIXELS)
    end = EndLoss(BlockwiseModel(source, structure), trace.forms, PIXELS, kind="divergence", seed=3)
    slope = end.gradient(0, last[0].detach())
    gradients = torch.autograd.grad(last[0], list(outputs.values()), slope)
    assert result.partial == {name for name in outputs if name.endswith("reduction")}
    for (name, _), gradient in zip(outputs.items(), gradients, strict=True):
        squares = gradient.square().mean(-1).view(len(PIXELS), -1)
        assert result.means[name] == pytest.approx(float(squares.sum() / len(PIXELS)), rel=1e-3)
        if name not in result.partial:
            torch.testing.assert_close(result.tokens[name], squares, rtol=1e-3, atol=1e-12)


def test_the_slope_of_features_has_the_curvature_of_their_angle(tmp_path: Path) -> None:
    """Its second moment, over seeds, is the second derivative of 1 - cosine: (I - u uᵀ) / |f|²."""
    source, structure, trace, _ = traced("clip", tmp_path)
    features = torch.tensor([[3.0, 0.0, -4.0]]).expand(len(PIXELS), 3)
    total = torch.zeros(3, 3)
    for seed in range(800):
        end = EndLoss(BlockwiseModel(source, structure), trace.forms, PIXELS, kind="divergence", seed=seed)
        slope = end._turn(features, slice(0, len(PIXELS)))
        total += slope.T @ slope
    unit = features[0] / 5
    torch.testing.assert_close(
        total / (800 * len(PIXELS)), (torch.eye(3) - torch.outer(unit, unit)) / 25, rtol=0.1, atol=2e-3
    )


def test_batches_do_not_matter(tmp_path: Path) -> None:
    source, structure, trace, _ = traced("swin", tmp_path)
    one = squared_gradients(BlockwiseModel(source, structure), PIXELS, trace)
    larger_batches = trace_model(BlockwiseModel(source, structure), PIXELS, 5)
    two = squared_gradients(BlockwiseModel(source, structure), PIXELS, larger_batches)
    for name, value in one.tokens.items():
        torch.testing.assert_close(value, two.tokens[name], rtol=1e-3, atol=1e-10)


def test_an_unsupported_image_size_is_refused_in_one_sentence(tmp_path: Path) -> None:
    source = open_source(str(save_tiny_vision("vit", tmp_path)))
    write_processor(tmp_path, size=20)
    with pytest.raises(SourceError, match=r"cannot read an image of 3 x 20 x 20 .*check preprocessor_config\.json"):
        measure_flow(source, find_structure(source.skeleton()).blocks, 0)
