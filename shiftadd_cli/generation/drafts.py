"""Drafts of the next tokens, which a model then verifies: from a smaller model, or from the text itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from shiftadd_cli.blockwise.forward import RefuseNoNumbers
from shiftadd_cli.errors import PromptError
from shiftadd_cli.generation.choice import TokenChoice
from shiftadd_cli.generation.pace import Draft
from shiftadd_cli.generation.sampling import Sampling
from shiftadd_cli.runtime.kv_cache import reversible_cache, take_back
from shiftadd_cli.runtime.opened import Loaded, Opened, open_any

LOOKUP = "lookup"


# Whether a draft with these confidences, the last of them of a token that may be added, gains from that token.
GainsFrom = Callable[[Sequence[float]], bool]


class Drafter(Protocol):
    """A source of drafts for one text at a time."""

    def begin(self, prompt: Sequence[int]) -> None:
        """Read the prompt of a new text, before any draft."""
        ...

    def draft(self, text: Sequence[int], most: int, gains: GainsFrom) -> Draft:
        """At most `most` tokens that may follow `text`, as long as each `gains`."""
        ...


class ModelDrafter:
    """Drafts with another model, such as the compressed form of the one that verifies."""

    def __init__(self, loaded: Loaded, choice: TokenChoice, vocabulary: int, positions: int | None) -> None:
        """vocabulary: the number of tokens that the verifying model knows; positions: the draft model's context.

        Raises PromptError if the model cannot take tokens back.
        """
        self._model, self._choice, self._vocabulary, self._positions = loaded.model, choice, vocabulary, positions
        self._cache = cache_for(loaded)
        self._refuse = RefuseNoNumbers(loaded.info.spec, loaded.info.dtype)
        self._cached: list[int] = []

    def begin(self, prompt: Sequence[int]) -> None:
        if self._positions is None or len(prompt) <= self._positions:
            self._forget(prompt)
            self._read(list(prompt))

    def draft(self, text: Sequence[int], most: int, gains: GainsFrom) -> Draft:
        room = most if self._positions is None else min(most, self._positions - len(text))
        result = Draft()
        if room > 0:
            self._forget(text)
        while len(result.tokens) < room:
            logits = self._read([*text, *result.tokens])
            result.steps += 1
            scores = self._choice.scores(logits, len(text) + len(result.tokens))
            token = int(scores.argmax())
            # The probability that this model itself gives to the token.
            confidence = float(torch.exp(logits[0, token] - logits[0].logsumexp(0)))
            if not gains([*result.confidences, confidence]):
                break
            result.tokens.append(token)
            result.confidences.append(confidence)
        return result

    def _forget(self, text: Sequence[int]) -> None:
        """Take back what is cached beyond the beginning that it has in common with a text. The last token of the text
        is read again, for its logits.

        Call this once per draft: the tokens that remain are final, so layers with a window drop what they no longer
        need. The tokens of a draft are not, until the next one.
        """
        same = 0
        for old, new in zip(self._cached, text[:-1], strict=False):
            if old != new:
                break
            same += 1
        if self._cached:
            take_back(self._cache, len(self._cached) - same)
        self._cached = self._cached[:same]

    def _read(self, text: list[int]) -> torch.Tensor:
        """Logits `[1, vocabulary]` after `text`, which begins with what is cached. The rest of it is computed."""
        ids = torch.tensor([text[len(self._cached) :]], device=self._model.device)
        logits = last_logits(self._model, ids, self._cache)[:, : self._vocabulary].float()
        self._cached = text
        return self._refuse(ids, logits)


class LookupDrafter:
    """Drafts what followed the last tokens when they were last in the text (Saxena, "Prompt Lookup Decoding", 2023)."""

    # The longest run of tokens that is looked up, and the longest match that counts for the confidence.
    _RUN, _MATCH = 3, 16

    def __init__(self) -> None:
        self.begin(())

    def begin(self, prompt: Sequence[int]) -> None:
        self._text: list[int] = []
        # The number of tokens up to the end of a run of tokens, where it was last followed by another token.
        self._ends: dict[tuple[int, ...], int] = {}
        self._index(prompt)

    def draft(self, text: Sequence[int], most: int, gains: GainsFrom) -> Draft:
        self._index(text)
        end = self._find()
        if end is None:
            return Draft()
        match = self._matching(end)
        # The longer the match, the likelier that it goes on; no more is known of it.
        confidence = match / (match + 1)
        result = Draft()
        while len(result.tokens) < most and gains([*result.confidences, confidence]):
            # A draft that reaches the end of the text goes on with its own beginning: the text repeats itself.
            source = end + len(result.tokens)
            beyond = source - len(self._text)
            result.tokens.append(self._text[source] if beyond < 0 else result.tokens[beyond])
            result.confidences.append(confidence)
        return result

    def _index(self, text: Sequence[int]) -> None:
        for token in text[len(self._text) :]:
            end = len(self._text)
            for length in range(1, min(self._RUN, end) + 1):
                self._ends[tuple(self._text[end - length :])] = end
            self._text.append(token)

    def _find(self) -> int | None:
        for length in range(min(self._RUN, len(self._text)), 0, -1):
            if (end := self._ends.get(tuple(self._text[-length:]))) is not None:
                return end
        return None

    def _matching(self, end: int) -> int:
        """The number of tokens before `end` that are equal to the last ones of the text."""
        most = min(end, self._MATCH)
        return next(
            (back for back in range(most) if self._text[end - 1 - back] != self._text[-1 - back]),
            most,
        )


class OpenedDraft:
    """A source of drafts of which only the headers have been read; see `open_draft`."""

    def __init__(self, opened: Opened | None, vocabulary: int) -> None:
        self._opened, self._vocabulary = opened, vocabulary

    def load(self, dtype: str, device: torch.device, sampling: Sampling) -> Drafter:
        """dtype, device: see `Opened.load`; sampling: that of the text."""
        if self._opened is None:
            return LookupDrafter()
        loaded = self._opened.load(dtype, device)
        return ModelDrafter(loaded, TokenChoice(sampling), self._vocabulary, self._opened.positions)


def open_draft(spec: str | None, opened: Opened, *, trust_remote_code: bool = False) -> OpenedDraft | None:
    """Open a draft for the model `opened`: `lookup`, or the name of a model; None stays None.

    Raises:
        PromptError: its tokens have other meanings than the model's.
        SourceError: there is no such model, or it has no tokenizer.
    """
    if spec is None:
        return None
    if spec == LOOKUP:
        return OpenedDraft(None, opened.vocab_size)
    draft = open_any(spec, trust_remote_code=trust_remote_code)
    theirs, ours = draft.load_tokenizer().get_vocab(), opened.load_tokenizer().get_vocab()
    if theirs != ours:
        token = min(theirs.items() ^ ours.items(), key=lambda item: (item[1], item[0]))[0]
        raise PromptError(
            f"The draft {spec} has another vocabulary than {opened.spec} (they differ in {token!r}); give a draft made "
            "from the same model."
        )
    return OpenedDraft(draft, opened.vocab_size)


def cache_for(loaded: Loaded) -> Any:
    """A cache that can take tokens back. Raises PromptError if the model has none."""
    cache = reversible_cache(loaded.model)
    if cache is None:
        raise PromptError(
            f"{loaded.info.spec} is a {type(loaded.model).__name__}, whose state cannot take back rejected tokens; "
            "leave out `draft`."
        )
    return cache


def last_logits(model: Any, ids: torch.Tensor, cache: Any, rows: int = 1) -> torch.Tensor:
    """Logits `[rows, vocabulary]` of the last tokens of `ids` `[1, tokens]`, which are appended to the cache."""
    # All logits of a long prompt can be larger than the model.
    kept = {"logits_to_keep": rows} if rows < ids.shape[1] and _keeps_logits(model) else {}
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True, **kept).logits
    return logits[0, -rows:]


def _keeps_logits(model: Any) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters
