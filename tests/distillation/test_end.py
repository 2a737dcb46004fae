"""The gap between predictions and its gradient, against the whole model in one graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, save_tiny
from tiny_vision import save_tiny_vision
from torch import Tensor
from transformers import PreTrainedModel

from shiftadd_cli.blockwise.forward import Prediction, predict
from shiftadd_cli.blockwise.head import Form
from shiftadd_cli.blockwise.model import BlockwiseModel
from shiftadd_cli.blockwise.trace import trace_model
from shiftadd_cli.distillation import end as module
from shiftadd_cli.distillation.end import EndGap
from shiftadd_cli.source import Structure, find_structure, open_source

CPU = torch.device("cpu")
TOKENS = torch.randint(0, 256, (4, 12), generator=torch.Generator().manual_seed(1))
PIXELS = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@contextmanager
def last_block_returning(
    model: PreTrainedModel, structure: Structure, forms: Sequence[Form], hidden: Tensor
) -> Iterator[None]:
    """Make the last block of a whole model return these hidden states inside the context."""
    last = model.get_submodule(structure.blocks[-1])
    handle = last.register_forward_hook(lambda *_: forms[-1].dress(hidden))
    yield
    handle.remove()


def distances(reference: Prediction, prediction: Prediction) -> Tensor:
    """KL divergence of logits, or 1 - cosine of features, by definition."""
    if reference.is_logits:
        log_p, log_q = reference.values.log_softmax(-1), prediction.values.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    return 1 - torch.nn.functional.cosine_similarity(reference.values, prediction.values, dim=-1)


# A vision model with a head, and one without.
@pytest.mark.parametrize("family", [*FAMILIES, "vit", "clip-projection"])
def test_gap_and_gradients_match_those_of_the_whole_model(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_text = family in FAMILIES
    samples = TOKENS if is_text else PIXELS
    source = open_source(str(save_tiny(family, tmp_path) if is_text else save_tiny_vision(family, tmp_path)))
    structure = find_structure(source.skeleton())
    source.materialise(structure.outside)
    trace = trace_model(BlockwiseModel(source, structure), samples, 4)
    # Slices of five tokens, which split the windows.
    monkeypatch.setattr(module, "SLICE_BYTES", 5 * 32 * 320)
    generator = torch.Generator().manual_seed(2)
    head = source.skeleton().get_output_embeddings() if is_text else None
    name = next((name for name, module in source.skeleton().named_modules() if module is head), None)
    # The model's own head is a compressed one; the original's is in memory beside it.
    originals = {} if head is None else {f"{name}.weight": head.weight + 0.02 * torch.randn(head.weight.shape)}
    read = source.skeleton().get_parameter
    end = EndGap(BlockwiseModel(source, structure), trace.forms, samples, read, originals)
    shape = (2, *trace.forms[-1].shape)
    original = torch.randn(shape, generator=generator)
    hidden = original + 0.3 * torch.randn(shape, generator=generator)
    before = {
        name: parameter.detach().clone()
        for name, parameter in source.skeleton().named_parameters()
        if not parameter.is_meta
    }
    with torch.no_grad():
        for vector in end.vectors.free.values():
            vector.mul_(1.2).add_(0.05)
    gap = end.gap(1, hidden, original, learn=True)
    assert all(torch.equal(source.skeleton().get_parameter(name), parameter) for name, parameter in before.items())

    model = source.load_model(torch.float64)
    states = hidden.double().requires_grad_()
    with torch.no_grad(), last_block_returning(model, structure, trace.forms, original.double()):
        compressed = {name: model.get_parameter(name).clone() for name in originals}
        for name, weight in originals.items():
            model.get_parameter(name).copy_(weight)
        reference = predict(model, samples[1:3])
        for name, weight in compressed.items():
            model.get_parameter(name).copy_(weight)
    for name, vector in end.vectors.free.items():
        model.get_parameter(name).data = vector.detach().double()
        model.get_parameter(name).requires_grad_()
    with last_block_returning(model, structure, trace.forms, states):
        expected = distances(reference, predict(model, samples[1:3]))
    total = expected.sum()
    total.backward()
    assert gap.predictions == expected.numel()
    assert gap.divergence == pytest.approx(float(total.detach()), rel=1e-4)
    assert float(total.detach()) > 1e-3
    torch.testing.assert_close(gap.gradient.double(), states.grad, rtol=1e-3, atol=1e-6)
    reached = {name for name, vector in end.vectors.free.items() if model.get_parameter(name).grad is not None}
    for name, vector in end.vectors.free.items():
        if name in reached and vector.grad is not None:
            torch.testing.assert_close(vector.grad.double(), model.get_parameter(name).grad, rtol=1e-3, atol=1e-5)
    # At least a norm runs after the blocks. Vectors before the blocks have no gradient here.
    learned = {name for name, vector in end.vectors.free.items() if vector.grad is not None}
    assert learned
    assert learned <= reached
    plain = end.gap(1, hidden, original, learn=False)
    assert plain.divergence == pytest.approx(gap.divergence, rel=1e-6)
    assert not plain.gradient.any()


def test_model_has_no_gap_to_itself(tmp_path: Path) -> None:
    source = open_source(str(save_tiny("llama", tmp_path)))
    structure = find_structure(source.skeleton())
    source.materialise(structure.outside)
    trace = trace_model(BlockwiseModel(source, structure), TOKENS, 4)
    end = EndGap(BlockwiseModel(source, structure), trace.forms, TOKENS, source.skeleton().get_parameter, {})
    gap = end.gap(0, trace.hidden[0], trace.hidden[0], learn=True)
    assert gap.divergence == 0
    assert gap.gradient.abs().max() < 1e-5
