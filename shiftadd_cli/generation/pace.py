"""Decides how many tokens are worth drafting, from measured times and from how many drafts were right."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np

# Most drafted tokens of a round. With the token before them they are eight rows, which our kernels decode in one call.
MOST_DRAFTED = 7


@dataclass
class Draft:
    """Drafted tokens.

    Attributes:
        tokens: in the order of the text.
        confidences: for each, the drafter's confidence that the model chooses it, from 0 to 1.
        steps: calls of a draft model, which may be one more than the tokens.
    """

    tokens: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    steps: int = 0


class Mean:
    """A mean that forgets: the newest value counts for at least a share of `1 / memory`."""

    def __init__(self, memory: int) -> None:
        self._memory, self._count, self.value = memory, 0, 0.0

    def add(self, value: float) -> None:
        self._count = min(self._count + 1, self._memory)
        self.value += (value - self.value) / self._count

    @property
    def is_known(self) -> bool:
        return self._count > 0


class Trust:
    """The share of drafted tokens that were right, by the drafter's confidence in them."""

    _BINS = 8
    # A bin starts as if it had seen this many tokens that were right as often as the confidence says.
    _PRIOR = 4.0

    def __init__(self) -> None:
        self._seen = [self._PRIOR] * self._BINS
        self._right = [self._PRIOR * (index + 0.5) / self._BINS for index in range(self._BINS)]

    def probability(self, confidence: float) -> float:
        """The probability that a token of this confidence is right, if all before it are."""
        index = self._bin(confidence)
        return self._right[index] / self._seen[index]

    def record(self, confidences: Sequence[float], accepted: int) -> None:
        """The first `accepted` tokens of a draft were right, and the next one, if any, was wrong."""
        for number, confidence in enumerate(confidences[: accepted + 1]):
            index = self._bin(confidence)
            self._seen[index] += 1
            self._right[index] += number < accepted

    def _bin(self, confidence: float) -> int:
        return min(int(confidence * self._BINS), self._BINS - 1)


class Pace:
    """The length of drafts for one text.

    A token is worth drafting if the expected number of tokens per second is higher with it than without. Drafting
    pauses where it has lost time against plain decoding, and pauses twice as long each time.
    """

    # Tokens decoded without drafts at the beginning, and then one in so many, for their time.
    _PLAIN, _EVERY = 3, 64
    # Tokens after which a loss counts, and the first pause.
    _TRIAL = 24

    def __init__(self, fixed: bool) -> None:
        """fixed: every draft is as long as it can be; times are only recorded."""
        self._fixed = fixed
        self._trust = Trust()
        # Seconds of a token without a draft, and of a step of drafting.
        self._plain, self._step = Mean(16), Mean(64)
        # Lengths of the last drafts and the seconds that verifying each took. Old ones are forgotten, so that a length
        # that was slow once is tried again.
        self._verified: deque[tuple[int, float]] = deque(maxlen=48)
        self._curve: tuple[list[int], list[float]] = ([0], [0.0])
        self._since_plain = 0
        self._pause, self._paused = self._TRIAL, 0
        self._tokens, self._seconds = 0, 0.0

    @property
    def plain_seconds(self) -> float | None:
        """Seconds per token of plain decoding, measured on this text; None if it was never measured."""
        return self._plain.value if self._plain.is_known else None

    def drafts_now(self, position: int) -> bool:
        """Whether to draft before new token number `position` is chosen."""
        if not self._fixed and (position < self._PLAIN or self._since_plain >= self._EVERY):
            return False
        return self._fixed or self._paused == 0

    def gains_from(self, confidences: Sequence[float]) -> bool:
        """Whether the last of these drafted tokens, given by their confidences, is worth its time."""
        if self._fixed:
            return True
        expected, chain = 1.0, 1.0
        for confidence in confidences:
            chain *= self._trust.probability(confidence)
            expected += chain
        with_it, without = self._seconds_of(len(confidences)), self._seconds_of(len(confidences) - 1)
        return expected * without > (expected - chain) * with_it

    def record(self, draft: Draft, accepted: int, draft_seconds: float, verify_seconds: float) -> None:
        """A round in which the first `accepted` tokens of the draft were right."""
        drafted = len(draft.tokens)
        if drafted:
            self._verified.append((drafted, verify_seconds))
        else:
            self._plain.add(verify_seconds)
        self._curve = self._measured()
        self._trust.record(draft.confidences, accepted)
        self._since_plain = self._since_plain + accepted + 1 if drafted else 0
        if draft.steps:
            self._step.add(draft_seconds / draft.steps)
        if self._paused:
            self._paused = max(0, self._paused - accepted - 1)
            return
        self._tokens += accepted + 1
        self._seconds += draft_seconds + verify_seconds
        if self._tokens >= self._TRIAL:
            if self._seconds > self._tokens * self._plain.value:
                self._paused = self._pause
                self._pause *= 2
            self._tokens, self._seconds = 0, 0.0

    def _seconds_of(self, drafted: int) -> float:
        """The expected seconds of a round. Lengths without a measurement are interpolated; longer ones than all
        measured count as the longest, so that they are tried."""
        return float(np.interp(drafted, *self._curve)) + self._step.value * drafted

    def _measured(self) -> tuple[list[int], list[float]]:
        """Lengths of drafts with measurements, in ascending order, and the seconds to verify each."""
        times: dict[int, list[float]] = {}
        for length, seconds in self._verified:
            times.setdefault(length, []).append(seconds)
        lengths = sorted(times)
        return [0, *lengths], [self._plain.value, *(median(times[length]) for length in lengths)]
