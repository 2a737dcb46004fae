"""Windows written in one batch are each model's own text, for every kind of cache."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, MIXTURES, UNUSUAL, VOCAB_SIZE, tiny_model

from shiftadd_cli.errors import CalibrationError, NumericalError
from shiftadd_cli.self_text.decode import Sampler, write_rows

LENGTH = 40
STOP = 0


class Recorder:
    """An author with a fixed opening that adds a token after every fifth sampled one, and records where it adds any."""

    def __init__(self, opening: list[int]) -> None:
        self._opening = opening
        self.set_at = set(range(len(opening)))
        self._position = len(opening)
        self._sampled = 0

    @property
    def may_stop(self) -> bool:
        return False

    def begin(self) -> list[int]:
        return list(self._opening)

    def follow(self, token: int) -> list[int]:
        self._sampled += 1
        added = [token, 9] if self._sampled % 5 == 0 else [token]
        if len(added) == 2:
            self.set_at.add(self._position + 1)
        self._position += len(added)
        return added


def greedy() -> Sampler:
    """Takes the likeliest token, since min_p excludes all others."""
    return Sampler(1.0, 1.0, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", [name for name in (*FAMILIES, *MIXTURES, *UNUSUAL) if name != "xlm_roberta"])
def test_every_token_is_the_likeliest_or_set_by_the_author(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64 if family in FAMILIES else torch.float32)
    authors = [Recorder([3, 4, 5]), Recorder([6]), Recorder([7, 8])]
    with torch.no_grad():
        windows = write_rows(model, authors, frozenset({STOP}), LENGTH, greedy(), iter(range(LENGTH)))
        logits = model(windows, use_cache=False).logits[:, :-1].double()
    assert windows.shape == (3, LENGTH)
    logits[..., STOP] = -math.inf
    best = logits.amax(-1)
    for row, author in enumerate(authors):
        sampled = [position for position in range(1, LENGTH) if position not in author.set_at]
        taken = logits[row].gather(1, windows[row, 1:, None])[:, 0]
        gaps = (best[row] - taken)[[position - 1 for position in sampled]]
        assert gaps.max() <= 1e-3
        assert windows[row, : len(author.begin())].tolist() == author.begin()
        added = [position for position in author.set_at if position >= len(author.begin()) and position < LENGTH]
        assert added
        assert all(windows[row, position] == 9 for position in added)


def test_a_window_does_not_depend_on_the_others() -> None:
    model = tiny_model("llama", dtype=torch.float64)
    with torch.inference_mode():
        alone, beside = (
            write_rows(model, [Recorder([first]) for first in firsts], frozenset(), LENGTH, greedy(), iter(()))
            for firsts in ([5], [5, 6, 7])
        )
    assert torch.equal(alone[0], beside[0])


def test_a_model_whose_decode_differs_from_prefill_is_refused() -> None:
    # In decode, transformers 5.23 counts positions from 0. In prefill, the model counts them from its padding index.
    model = tiny_model("xlm_roberta")
    with torch.inference_mode(), pytest.raises(CalibrationError, match="differently in decoding than in prefill"):
        write_rows(model, [Recorder([5])], frozenset(), LENGTH, greedy(), iter(()))


@pytest.mark.parametrize(
    ("parameter", "value", "message"),
    [
        ("lm_head.weight", math.nan, r"^lm_head\.weight holds values that are not finite"),
        ("model.layers.1.mlp.up_proj.weight", math.inf, r"^model\.layers\.1\.mlp\.up_proj\.weight holds values"),
        (
            "model.layers.0.post_attention_layernorm.weight",
            3e38,
            r"output of model\.layers\.0 is not finite in float32",
        ),
        ("lm_head.weight", 3e38, "LlamaForCausalLM gives logits that are not finite"),
    ],
)
def test_values_that_are_not_finite_are_refused_by_their_origin(parameter: str, value: float, message: str) -> None:
    model = tiny_model("llama")
    model.get_parameter(parameter).data.fill_(value)
    with torch.inference_mode(), pytest.raises(NumericalError, match=message):
        write_rows(model, [Recorder([5])], frozenset(), LENGTH, greedy(), iter(()))


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.floats(min_value=-6, max_value=6), min_size=2, max_size=12),
    st.floats(min_value=0.3, max_value=3),
    st.sampled_from([0.0, 0.02, 0.3]),
)
def test_draws_are_as_frequent_as_their_probabilities(values: list[float], temperature: float, min_p: float) -> None:
    count = 20_000
    logits = torch.tensor(values, dtype=torch.float64)
    probabilities = (logits / temperature).softmax(-1)
    clipped = torch.where(probabilities >= min_p * probabilities.max() * (1 - 1e-9), probabilities, 0.0)
    expected = clipped / clipped.sum()
    sampler = Sampler(temperature, min_p, torch.Generator().manual_seed(1))
    drawn = torch.bincount(sampler.draw(logits.float().repeat(count, 1)), minlength=len(values)) / count
    # A token on the edge of the cut may be on either side of it in float32.
    edge = (probabilities / probabilities.max() - min_p).abs() < 1e-5
    if min_p and edge.any():
        return
    assert not drawn[expected == 0].any()
    assert (drawn - expected).abs().max() <= 5 * (0.25 / count) ** 0.5


def test_the_last_of_many_tokens_can_be_drawn_and_none_beyond_it() -> None:
    logits = torch.full((4096, VOCAB_SIZE), -math.inf)
    logits[:, -1] = 0.0
    drawn = Sampler(1.0, 0.0, torch.Generator().manual_seed(2)).draw(logits)
    assert (drawn == VOCAB_SIZE - 1).all()
