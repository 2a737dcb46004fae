"""Windows written at once are what each model says of its own, for every kind of cache."""

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
    """Begins with given tokens, sets one more after every fifth that was sampled, and notes where it set any."""

    def __init__(self, begun: list[int]) -> None:
        self._begun = begun
        self.set_at = set(range(len(begun)))
        self._position = len(begun)
        self._sampled = 0

    @property
    def may_stop(self) -> bool:
        return False

    def begin(self) -> list[int]:
        return list(self._begun)

    def follow(self, token: int) -> list[int]:
        self._sampled += 1
        added = [token, 9] if self._sampled % 5 == 0 else [token]
        if len(added) == 2:
            self.set_at.add(self._position + 1)
        self._position += len(added)
        return added


def greedy() -> Sampler:
    """Takes the likeliest token: no other has as much of a chance."""
    return Sampler(1.0, 1.0, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", [name for name in (*FAMILIES, *MIXTURES, *UNUSUAL) if name != "xlm_roberta"])
def test_every_token_is_the_likeliest_after_those_before_it_or_was_set(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64 if family in FAMILIES else torch.float32)
    authors = [Recorder([3, 4, 5]), Recorder([6]), Recorder([7, 8])]
    with torch.no_grad():
        windows = write_rows(model, authors, frozenset({STOP}), LENGTH, greedy(), iter(range(LENGTH)))
        logits = model(windows, use_cache=False).logits[:, :-1].double()
    assert windows.shape == (3, LENGTH)
    logits[..., STOP] = -math.inf
    best = logits.amax(-1)
    for row, author in enumerate(authors):
        sampled = [place for place in range(1, LENGTH) if place not in author.set_at]
        taken = logits[row].gather(1, windows[row, 1:, None])[:, 0]
        gaps = (best[row] - taken)[[place - 1 for place in sampled]]
        assert gaps.max() <= 1e-3
        assert windows[row, : len(author.begin())].tolist() == author.begin()
        after = [place for place in author.set_at if place >= len(author.begin()) and place < LENGTH]
        assert after
        assert all(windows[row, place] == 9 for place in after)


def test_a_window_does_not_depend_on_what_is_written_beside_it() -> None:
    model = tiny_model("llama", dtype=torch.float64)
    with torch.inference_mode():
        alone, beside = (
            write_rows(model, [Recorder([first]) for first in firsts], frozenset(), LENGTH, greedy(), iter(()))
            for firsts in ([5], [5, 6, 7])
        )
    assert torch.equal(alone[0], beside[0])


def test_a_model_that_writes_by_other_predictions_is_refused() -> None:
    # transformers 5.23 generates with positions from 0, where the model reads with positions behind its padding.
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
def test_a_model_without_numbers_is_refused_by_where_they_are_lost(parameter: str, value: float, message: str) -> None:
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
def test_draws_are_as_frequent_as_they_are_probable(values: list[float], temperature: float, min_p: float) -> None:
    count = 20_000
    logits = torch.tensor(values, dtype=torch.float64)
    chances = (logits / temperature).softmax(-1)
    kept = torch.where(chances >= min_p * chances.max() * (1 - 1e-9), chances, 0.0)
    expected = kept / kept.sum()
    sampler = Sampler(temperature, min_p, torch.Generator().manual_seed(1))
    drawn = torch.bincount(sampler.draw(logits.float().repeat(count, 1)), minlength=len(values)) / count
    # A token on the edge of the cut may be on either side of it in float32.
    edge = (chances / chances.max() - min_p).abs() < 1e-5
    if edge.any():
        return
    assert not drawn[expected == 0].any()
    assert (drawn - expected).abs().max() <= 5 * (0.25 / count) ** 0.5


def test_the_last_of_many_tokens_can_be_drawn_and_none_behind_it() -> None:
    logits = torch.full((4096, VOCAB_SIZE), -math.inf)
    logits[:, -1] = 0.0
    drawn = Sampler(1.0, 0.0, torch.Generator().manual_seed(2)).draw(logits)
    assert (drawn == VOCAB_SIZE - 1).all()
