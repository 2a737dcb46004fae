"""Perplexity of models on a text, and their distance from an original, in one pass over the text."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from shiftadd_cli.blockwise.distribution import Reference
from shiftadd_cli.data.windows import Windows
from shiftadd_cli.distributed.team import ALONE, Team
from shiftadd_cli.errors import CalibrationError, RecipeError
from shiftadd_cli.evaluation.logits import RowLogits
from shiftadd_cli.progress import progress
from shiftadd_cli.source.positions import position_limit, window_length

# Size of one float32 buffer of [rows, vocabulary]; four are alive at once.
BUFFER_BYTES = 16 << 20


@dataclass(frozen=True)
class Score:
    """Scores of one model, per predicted token.

    Attributes:
        nll, nll_error: mean negative log-likelihood in nats, and its standard error.
        perplexity, perplexity_error: exp(nll), and its standard error to first order.
        kl, kl_error: mean KL(original || model) over the vocabulary in nats, and its standard error.
        agreement: share of tokens for which original and model have the same most probable token, 0 to 1.
        seconds: time spent in this model and its statistics.

    kl, kl_error and agreement are None if no original was given. Standard errors treat windows as independent draws,
    since tokens of one window are not independent; they are None for a single window.
    """

    nll: float
    nll_error: float | None
    perplexity: float
    perplexity_error: float | None
    kl: float | None
    kl_error: float | None
    agreement: float | None
    seconds: float


def score_models(
    models: Sequence[tuple[str, Any]],
    windows: Windows,
    *,
    batch_size: int = 8,
    original: tuple[str, Any] | None = None,
    show_progress: bool = True,
    team: Team = ALONE,
) -> tuple[list[Score], Score | None]:
    """Score causal language models on the windows of a text; every model sees the same batches.

    Every token after the first of a window, or after its special tokens, is predicted from the preceding tokens of the
    window. Means are over these tokens. The model's logits are converted to float32, log-softmax is float32, and sums
    are float64.

    Args:
        models: (name for messages, transformers model in evaluation mode) pairs.
        windows: see `text_windows`.
        batch_size: windows per batch; reduced if a model's logits cannot be computed by rows.
        original: reference for KL and agreement; it is scored as well.
        team: its processes share the windows; every process gets all scores.

    Returns:
        The scores in the order of `models`, and the score of the original.

    Raises:
        CalibrationError: there is no window.
        RecipeError: windows are longer than a model's positions, or a vocabulary differs from the original's.
        NumericalError: logits are not finite.
    """
    count = windows.scored_tokens
    if not count:
        raise CalibrationError("Perplexity needs a token to predict, and the text has none; give a longer text.")
    longest = max(windows.lengths)
    first = [] if original is None else [original]
    readers = [RowLogits(model, name) for name, model in (*first, *models)]
    for (name, model), reader in zip((*first, *models), readers, strict=True):
        window_length(longest, longest, {name: position_limit(model.config)}, "`context`")
        _check_vocabulary(name, reader.vocab_size, readers[0] if first else None)
        reader.check(next(windows.batches(1)))
    limits = [limit for reader in readers if (limit := reader.max_windows(longest)) is not None]
    size = min([batch_size, *limits])
    total = windows.batch_count(size)
    own = range(team.rank, total, team.size)
    work: Iterable[Tensor] = islice(windows.batches(size), team.rank, None, team.size)
    if show_progress and team.first:
        work = progress(work, total=len(own), desc="Evaluating")
    batch_sums = []
    with torch.inference_mode():
        for batch in work:
            sums = [_Sums() for _ in readers]
            _score_batch(readers, sums, batch, windows.unscored, against_first=bool(first))
            batch_sums.append([asdict(model_sums) for model_sums in sums])
    everyone = team.gather(batch_sums)
    totals = [_Sums() for _ in readers]
    for number in range(total):
        for model_total, part in zip(totals, everyone[number % team.size][number // team.size], strict=True):
            model_total.add(_Sums(**part))
    scores = [model_total.score(count) for model_total in totals]
    return scores[len(first) :], scores[0] if first else None


@dataclass
class _Sums:
    """Sums of one model, per window and over all windows."""

    lengths: list[int] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    agreed: int = 0
    seconds: float = 0.0

    def add(self, other: _Sums) -> None:
        """Add the sums of further windows."""
        self.lengths += other.lengths
        self.nll += other.nll
        self.kl += other.kl
        self.agreed += other.agreed
        self.seconds += other.seconds

    def score(self, count: int) -> Score:
        assert sum(self.lengths) == count
        nll, nll_error = self._mean(self.nll)
        kl, kl_error = self._mean(self.kl) if self.kl else (None, None)
        # The mean of a damaged model may exceed the range of exp.
        perplexity = math.exp(nll) if nll < 700 else math.inf
        return Score(
            nll=nll,
            nll_error=nll_error,
            perplexity=perplexity,
            perplexity_error=None if nll_error is None else perplexity * nll_error,
            kl=kl,
            kl_error=kl_error,
            agreement=self.agreed / count if self.kl else None,
            seconds=self.seconds,
        )

    def _mean(self, sums: list[float]) -> tuple[float, float | None]:
        """Mean per token and its standard error, from sums per window."""
        totals = torch.tensor(sums, dtype=torch.float64)
        lengths = torch.tensor(self.lengths, dtype=torch.float64)
        mean = totals.sum() / lengths.sum()
        windows = len(totals)
        if windows < 2:
            return mean.item(), None
        spread = ((totals - mean * lengths) ** 2).sum() * windows / (windows - 1)
        return mean.item(), (spread.sqrt() / lengths.sum()).item()


def _score_batch(
    readers: list[RowLogits], sums: list[_Sums], windows: Tensor, unscored: int, *, against_first: bool
) -> None:
    """Add the statistics of windows `[w, n]` to the sums; the first `unscored` tokens of each are not predicted."""
    count, length = len(windows), windows.shape[1] - unscored
    targets = windows[:, unscored:].reshape(-1)
    states = []
    for reader, total in zip(readers, sums, strict=True):
        start = time.monotonic()
        states.append(reader.states(windows, unscored))
        total.seconds += time.monotonic() - start
    nll = torch.empty(len(readers), len(targets), dtype=torch.float64)
    kl = torch.empty(len(readers), len(targets), dtype=torch.float64)
    rows = max(1, BUFFER_BYTES // (4 * readers[0].vocab_size))
    for piece in (slice(start, start + rows) for start in range(0, len(targets), rows)):
        reference: Reference | None = None
        for index, (reader, total) in enumerate(zip(readers, sums, strict=True)):
            start = time.monotonic()
            log_probs = reader.logits(states[index][piece]).log_softmax(-1)
            log_likelihood = log_probs.gather(1, targets[piece].to(log_probs.device).unsqueeze(1)).squeeze(1)
            nll[index, piece] = -log_likelihood.double().cpu()
            if reference is not None:
                kl[index, piece] = reference.divergence(log_probs).double().cpu()
                total.agreed += int((log_probs.argmax(-1) == reference.top).sum())
            elif against_first:
                reference = Reference(log_probs)
            total.seconds += time.monotonic() - start
    for index, (reader, total) in enumerate(zip(readers, sums, strict=True)):
        reader.refuse_not_finite(nll[index], "likelihood")
        total.lengths += [length] * count
        total.nll += nll[index].view(count, length).sum(1).tolist()
        if against_first and index > 0:
            reader.refuse_not_finite(kl[index], "KL divergence from the original")
            total.kl += kl[index].view(count, length).sum(1).tolist()


def _check_vocabulary(name: str, vocab_size: int, original: RowLogits | None) -> None:
    if original is not None and vocab_size != original.vocab_size:
        raise RecipeError(
            f"{name} has a vocabulary of {vocab_size} and {original.name} one of {original.vocab_size}, so they cannot "
            "be compared; give the original that it was made from."
        )
