"""Whatever is drafted, the text is that of plain decoding."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from artifacts import write_checkpoint
from chi_square import chi_square
from compiled import needs_kernels
from tiny_models import FAMILIES, MIXTURES, save_tiny, tiny_model, tiny_tokenizer

from shiftadd_cli.errors import NumericalError, PromptError
from shiftadd_cli.generation.choice import TokenChoice
from shiftadd_cli.generation.drafts import Drafter, GainsFrom, LookupDrafter, ModelDrafter
from shiftadd_cli.generation.pace import MOST_DRAFTED, Draft
from shiftadd_cli.generation.prompt import Prompt
from shiftadd_cli.generation.run import Generated, generate_text
from shiftadd_cli.generation.sampling import Sampling
from shiftadd_cli.generation.speculation import Speculated, speculate
from shiftadd_cli.runtime.opened import Loaded, load_any

PROMPT = Prompt((5, 9, 30, 2, 11, 9, 30), chat=False)
DRAWS = {"likeliest": Sampling(max_new_tokens=60), "drawn": Sampling(60, temperature=0.8, top_p=0.9, seed=4)}


class Scripted:
    """Drafts from a known text, with wrong tokens in between. wrong: their share."""

    def __init__(self, text: Sequence[int], wrong: float = 0.0) -> None:
        self._text, self._wrong, self._random = list(text), wrong, random.Random(1)
        self.lengths: list[int] = []

    def begin(self, prompt: Sequence[int]) -> None:
        assert list(prompt) == self._text[: len(prompt)]

    def draft(self, text: Sequence[int], most: int, gains: GainsFrom) -> Draft:
        assert list(text)[: len(self._text)] == self._text[: len(text)]
        tokens = self._text[len(text) : len(text) + most]
        tokens = [token if self._random.random() >= self._wrong else (token + 1) % 300 for token in tokens]
        tokens = tokens[: self._random.randint(0, most)] if self._wrong else tokens
        self.lengths.append(len(tokens))
        return Draft(tokens, [0.5] * len(tokens))


def endless(loaded: Loaded) -> Loaded:
    """The same model without tokens that end a text."""
    loaded.model.generation_config.eos_token_id = None
    loaded.tokenizer.eos_token = None
    return loaded


def tokens_of(loaded: Loaded, sampling: Sampling, drafter: Drafter, fixed: int | None = None) -> list[int]:
    choice, account = TokenChoice(sampling), Speculated()
    limit = sampling.max_new_tokens
    return list(speculate(loaded, drafter, PROMPT.ids, choice, limit, account, fixed=fixed))


def plain_tokens(loaded: Loaded, sampling: Sampling) -> list[int]:
    """The whole text without a cache, as an independent reference."""
    choice, tokens = TokenChoice(sampling), list(PROMPT.ids)
    with torch.no_grad():
        for _ in range(sampling.max_new_tokens):
            logits = loaded.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1:]
            tokens.append(int(choice.scores(logits, len(tokens)).argmax()))
    return tokens


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return endless(load_any(str(save_tiny("llama", tmp_path_factory.mktemp("models") / "one"))))


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_drafts_do_not_change_the_text(family: str, tmp_path: Path) -> None:
    loaded = endless(load_any(str(save_tiny(family, tmp_path / "model"))))
    for sampling in DRAWS.values():
        text = plain_tokens(loaded, sampling)
        plain = generate_text(loaded, PROMPT, sampling)
        assert plain.speculated is None
        for wrong in (0.0, 0.3, 1.0):
            generated = generate_text(loaded, PROMPT, sampling, drafter=Scripted(text, wrong))
            assert generated.text == plain.text
            assert tokens_of(loaded, sampling, Scripted(text, wrong)) == text[len(PROMPT.ids) :]


@pytest.mark.parametrize("draws", DRAWS)
def test_other_models_and_lookup_do_not_change_the_text(loaded: Loaded, tmp_path: Path, draws: str) -> None:
    sampling = DRAWS[draws]
    text = plain_tokens(loaded, sampling)[len(PROMPT.ids) :]
    other = load_any(str(save_tiny("qwen3", tmp_path / "other", seed=3)))
    for fixed in (None, 1, 4):
        for drafter in (
            LookupDrafter(),
            ModelDrafter(other, TokenChoice(sampling), 320, None),
            ModelDrafter(loaded, TokenChoice(sampling), 320, 40),
        ):
            assert tokens_of(loaded, sampling, drafter, fixed) == text


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("draws", DRAWS)
def test_our_kernels_give_the_same_bits_in_drafts_of_any_length(tmp_path: Path, dtype: str, draws: str) -> None:
    checkpoint = write_checkpoint(tiny_model("llama"), tmp_path / "packed", tables=True)
    tiny_tokenizer().save_pretrained(checkpoint.folder)
    loaded, sampling = endless(load_any(str(checkpoint.folder), dtype)), DRAWS[draws]
    logits: list[torch.Tensor] = []
    loaded.model.lm_head.register_forward_hook(lambda *arguments: logits.append(arguments[-1][0]))

    def decoded(text: Sequence[int], fixed: int) -> tuple[list[int], torch.Tensor]:
        """The text and the logits that its new tokens were chosen from, with drafts from a text."""
        logits.clear()
        tokens = tokens_of(loaded, sampling, Scripted(text), fixed)
        return [*PROMPT.ids, *tokens], torch.cat([logits[0][-1:], *logits[1:]])

    text, alone = decoded(PROMPT.ids, 1)
    for fixed in (1, 3, MOST_DRAFTED):
        again, together = decoded(text, fixed)
        assert again == text
        assert torch.equal(together, alone)


def test_right_drafts_save_passes(loaded: Loaded) -> None:
    sampling = DRAWS["likeliest"]
    text = plain_tokens(loaded, sampling)
    drafter, account = Scripted(text), Speculated()
    tokens = speculate(loaded, drafter, PROMPT.ids, TokenChoice(sampling), 60, account, fixed=7)
    assert len(list(tokens)) == 60
    # One token from the prompt, seven times eight, and three: two drafted ones and the model's own.
    assert drafter.lengths == [7] * 7 + [2]
    assert (account.passes, account.drafted, account.accepted, account.close_calls) == (8, 51, 51, 0)
    wrong, account = Scripted(text, 1.0), Speculated()
    assert len(list(speculate(loaded, wrong, PROMPT.ids, TokenChoice(sampling), 60, account, fixed=7))) == 60
    assert (account.passes, account.accepted) == (59, 0)
    assert account.drafted == sum(wrong.lengths)


def test_text_ends_within_a_draft(loaded: Loaded) -> None:
    sampling = DRAWS["likeliest"]
    text = plain_tokens(loaded, sampling)
    new = text[len(PROMPT.ids) :]
    last = new[5]
    ending = loaded._replace(tokenizer=tiny_tokenizer())
    ending.tokenizer.eos_token = ending.tokenizer.convert_ids_to_tokens(last)
    result = generate_text(ending, PROMPT, sampling, drafter=Scripted(text), draft_tokens=7)
    assert (result.new_tokens, result.stopped) == (new.index(last) + 1, "end")
    cut = generate_text(loaded, PROMPT, sampling, drafter=Scripted(text), draft_tokens=7, room=12)
    assert (cut.new_tokens, cut.stopped) == (12, "context")


def test_drawn_tokens_have_the_exact_probabilities(loaded: Loaded) -> None:
    """The second token is verified with a draft that is often right and often wrong."""
    temperature, count = 0.7, 600
    with torch.no_grad():
        first = (loaded.model(input_ids=torch.tensor([PROMPT.ids])).logits[0, -1] / temperature).softmax(-1)
        pairs = torch.tensor([[*PROMPT.ids, token] for token in range(len(first))])
        then = (loaded.model(input_ids=pairs).logits[:, -1] / temperature).softmax(-1)
    probabilities = first @ then
    likely = probabilities.topk(20).indices.tolist()
    counts = torch.zeros(len(first))
    for seed in range(count):
        sampling = Sampling(2, temperature=temperature, seed=seed)
        drafted = Draft([likely[seed % 20]], [0.5])
        drafter = Scripted(PROMPT.ids)
        drafter.draft = lambda *_, drafted=drafted: drafted  # type: ignore[method-assign]
        # Three tokens, so that a draft of one is allowed for the second.
        tokens = tokens_of(loaded, replace(sampling, max_new_tokens=3), drafter, 1)
        counts[tokens[1]] += 1
    assert 0.3 < chi_square(counts, probabilities) < 2


def test_gain_is_measured_against_tokens_without_drafts(loaded: Loaded) -> None:
    ticks = itertools.count()
    text = plain_tokens(loaded, DRAWS["likeliest"])
    result = generate_text(loaded, PROMPT, DRAWS["likeliest"], drafter=Scripted(text), now=lambda: float(next(ticks)))
    assert result.speculated is not None
    # A round reads the clock three times, so drafting and verifying take a second each; a token that comes, one more.
    assert result.speculated.plain_seconds == 1
    assert result.gain == pytest.approx(59 / result.decode_seconds)
    assert result.to_dict()["speculated"]["accepted"] == result.speculated.accepted
    assert Generated("t", 3, [7] * 9, 1.0, 2.0, "length").gain is None


def test_close_calls_are_counted_in_16_bits_only(tmp_path: Path) -> None:
    model = tiny_model("llama")
    # The first two tokens of the vocabulary have nearly the same logits, far above the others.
    head = torch.full_like(model.lm_head.weight, 0.0)
    head[:2] = 1.0
    head[1, 0] = 1.0 + 2**-7
    model.lm_head.weight.data.copy_(head)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    for dtype, expected in (("float32", 0), ("bfloat16", 11)):
        loaded = endless(load_any(str(tmp_path), dtype))
        result = generate_text(loaded, PROMPT, Sampling(12), drafter=LookupDrafter())
        assert result.speculated is not None
        assert result.speculated.close_calls == expected


def test_models_that_mix_all_tokens_into_a_state_are_refused(loaded: Loaded, tmp_path: Path) -> None:
    for family in ("mamba", "jamba", "zamba2"):
        state = endless(load_any(str(save_tiny(family, tmp_path / family))))
        with pytest.raises(PromptError, match="cannot take back rejected tokens; leave out `draft`"):
            generate_text(state, PROMPT, Sampling(4), drafter=LookupDrafter())
        with pytest.raises(PromptError, match="cannot take back"):
            ModelDrafter(state, TokenChoice(Sampling()), 320, None)


def test_logits_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    broken = endless(load_any(str(save_tiny("llama", tmp_path / "model"))))
    broken.model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(NumericalError, match="not finite in float32"):
        generate_text(broken, PROMPT, Sampling(4), drafter=LookupDrafter())
    with pytest.raises(NumericalError, match="not finite in float32"):
        ModelDrafter(broken, TokenChoice(Sampling()), 320, None).begin(PROMPT.ids)
