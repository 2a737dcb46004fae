"""Drafts from the text itself and from a model, compared with slow obvious ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import save_tiny, tiny_tokenizer

from shiftadd_cli.errors import PromptError, SourceError
from shiftadd_cli.generation.choice import TokenChoice
from shiftadd_cli.generation.drafts import LookupDrafter, ModelDrafter, open_draft
from shiftadd_cli.generation.sampling import Sampling
from shiftadd_cli.runtime.opened import Loaded, load_any, open_any

PROMPT = [5, 9, 30, 2, 11]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load_any(str(save_tiny("llama", tmp_path_factory.mktemp("models") / "one")))


def always(confidences: Sequence[float]) -> bool:
    return True


def looked_up(text: list[int], most: int) -> list[int]:
    """What followed the longest run of up to three last tokens where it was last in the text before."""
    for length in (3, 2, 1):
        run = text[-length:]
        for start in range(len(text) - length - 1, -1, -1):
            if len(run) == length and text[start : start + length] == run:
                following = list(text)
                for number in range(most):
                    following.append(following[start + length + number])
                return following[len(text) :]
    return []


@given(text=st.lists(st.integers(0, 3), min_size=1, max_size=40), prompt=st.integers(0, 40), most=st.integers(0, 9))
def test_lookup_finds_the_last_match(text: list[int], prompt: int, most: int) -> None:
    drafter = LookupDrafter()
    drafter.begin(text[:prompt])
    draft = drafter.draft(text, most, always)
    assert draft.tokens == looked_up(text, most)
    assert len(draft.confidences) == len(draft.tokens)
    assert all(0 < confidence < 1 for confidence in draft.confidences)
    assert draft.steps == 0


def test_longer_matches_are_trusted_more() -> None:
    confidences = []
    for match in (1, 2, 5, 12):
        text = [7, *range(20, 20 + match), 8, 9, *range(20, 20 + match)]
        (confidence,) = set(LookupDrafter().draft(text, 3, always).confidences)
        confidences.append(confidence)
    assert confidences == sorted(set(confidences))


def test_lookup_stops_where_it_no_longer_gains() -> None:
    text = [1, 2, 3, 4, 5, 6, 1, 2]
    assert LookupDrafter().draft(text, 9, lambda confidences: len(confidences) <= 2).tokens == [3, 4]
    assert LookupDrafter().draft(text, 9, lambda confidences: False).tokens == []


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_model_drafts_what_it_would_write(loaded: Loaded, temperature: float) -> None:
    choice = TokenChoice(Sampling(temperature=temperature, seed=3))

    def written(text: list[int], count: int) -> tuple[list[int], list[float]]:
        """Without a cache."""
        tokens, confidences = list(text), []
        for _ in range(count):
            with torch.no_grad():
                logits = loaded.model(input_ids=torch.tensor([tokens])).logits[0, -1:]
            token = int(choice.scores(logits, len(tokens)).argmax())
            confidences.append(float(logits.softmax(-1)[0, token]))
            tokens.append(token)
        return tokens[len(text) :], confidences

    drafter = ModelDrafter(loaded, choice, 320, None)
    drafter.begin(PROMPT)
    text = [*PROMPT, 8]
    # Accepted in part, in whole, not at all, and replaced from the beginning.
    for kept in (2, 4, 0, 3, None):
        draft = drafter.draft(text, 4, always)
        tokens, confidences = written(text, 4)
        assert draft.tokens == tokens
        assert draft.confidences == pytest.approx(confidences, abs=1e-4)
        assert draft.steps == 4
        text = [3, 1, 2, *text[4:]] if kept is None else [*text, *draft.tokens[:kept], 17]
    assert drafter.draft(text, 4, lambda confidences: len(confidences) < 3).tokens == written(text, 2)[0]


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_sliding_windows_stay_whole_through_rejections(family: str, tmp_path: Path) -> None:
    loaded = load_any(str(save_tiny(family, tmp_path / family)))
    drafter = ModelDrafter(loaded, TokenChoice(Sampling()), 320, None)
    text = [number % 300 for number in range(7, 90)]
    drafter.begin(text)
    for kept in (5, 0, 3, 0):
        draft = drafter.draft(text, 5, always)
        tokens = list(text)
        for _ in range(5):
            with torch.no_grad():
                tokens.append(int(loaded.model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        assert draft.tokens == tokens[len(text) :]
        text = [*text, *draft.tokens[:kept], 17]


def test_model_drafts_no_token_that_the_other_does_not_know(loaded: Loaded) -> None:
    choice = TokenChoice(Sampling(temperature=5.0))
    drafter = ModelDrafter(loaded, choice, 12, None)
    drafter.begin(PROMPT)
    tokens = drafter.draft([*PROMPT, 8], 40, always).tokens
    assert len(tokens) == 40
    assert max(tokens) == 11


def test_model_stops_at_the_end_of_its_context(loaded: Loaded) -> None:
    def count(positions: int | None, text: list[int]) -> int:
        drafter = ModelDrafter(loaded, TokenChoice(Sampling()), 320, positions)
        drafter.begin(text[:-1])
        return len(drafter.draft(text, 5, always).tokens)

    text = [*PROMPT, 8]
    assert [count(positions, text) for positions in (None, 11, 10, 7, 6, 5, 3)] == [5, 5, 4, 1, 0, 0, 0]


def test_draft_must_have_the_same_vocabulary(tmp_path: Path, loaded: Loaded) -> None:
    model = open_any(loaded.info.spec)
    assert open_draft(None, model) is None
    lookup, same = open_draft("lookup", model), open_draft(loaded.info.spec, model)
    assert lookup is not None
    assert isinstance(lookup.load("auto", torch.device("cpu"), Sampling()), LookupDrafter)
    assert same is not None
    assert isinstance(same.load("auto", torch.device("cpu"), Sampling()), ModelDrafter)
    with pytest.raises(SourceError, match="There is no model"):
        open_draft(str(tmp_path / "nowhere"), model)
    other = save_tiny("llama", tmp_path / "other")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(PromptError, match=r"another vocabulary than .* \(they differ in '<another>'\)"):
        open_draft(str(other), model)
