"""Drafts are as long as it pays by the measured times, and stop where it does not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shiftadd_cli.generation.pace import Draft, Mean, Pace, Trust


def run(pace: Pace, tokens: int, *, confidence: float, right: float, step: float, row: float) -> list[int]:
    """The lengths of the drafts of a text, where plain decoding takes 1 s a token.

    right: the share of drafted tokens that are right; step, row: seconds of a drafted and of a verified token.
    """
    lengths: list[int] = []
    new, owed = 0, 0.0
    while new < tokens:
        draft = Draft()
        if pace.drafts_now(new):
            while len(draft.tokens) < 7:
                draft.steps += 1
                if not pace.gains_from([*draft.confidences, confidence]):
                    break
                draft.tokens.append(1)
                draft.confidences.append(confidence)
        accepted = 0
        for _ in draft.tokens:
            owed += right
            if owed < 1:
                break
            owed -= 1
            accepted += 1
        pace.record(draft, accepted, step * draft.steps, 1 + row * len(draft.tokens))
        lengths.append(len(draft.tokens))
        new += accepted + 1
    return lengths


@given(confidence=st.floats(0, 1), right=st.integers(0, 400), wrong=st.integers(0, 400))
def test_trust_is_the_share_that_was_right(confidence: float, right: int, wrong: int) -> None:
    trust = Trust()
    assert abs(trust.probability(confidence) - confidence) <= 1 / 16 + 1e-9
    for _ in range(right):
        trust.record([confidence], 1)
    for _ in range(wrong):
        trust.record([confidence], 0)
    share = (right + 4 * confidence) / (right + wrong + 4)
    assert abs(trust.probability(confidence) - share) <= 1 / 16 + 1e-9


def test_tokens_after_a_wrong_one_prove_nothing() -> None:
    one, other = Trust(), Trust()
    one.record([0.9, 0.2, 0.6, 0.6], 1)
    other.record([0.9, 0.2], 1)
    assert all(one.probability(confidence) == other.probability(confidence) for confidence in (0.9, 0.2, 0.6))


def test_plain_tokens_are_measured_first_and_now_and_then() -> None:
    lengths = run(Pace(False), 390, confidence=0.99, right=1, step=0.05, row=0.02)
    assert lengths[:3] == [0, 0, 0]
    assert set(lengths[3:]) == {0, 7}
    # Eight tokens a round: after the eighth, 64 have come since the last one that was decoded alone.
    assert [index for index, length in enumerate(lengths) if not length] == [0, 1, 2, 11, 20, 29, 38, 47]


@pytest.mark.parametrize("right", [0.5, 0.7, 0.85])
@pytest.mark.parametrize(("step", "row"), [(0.01, 0.01), (0.2, 0.01), (0.45, 0.05)])
def test_drafts_have_about_the_best_length(right: float, step: float, row: float) -> None:
    def rate(length: int) -> float:
        """Tokens per second of drafts of this length."""
        return sum(right**number for number in range(length + 1)) / (1 + (step + row) * length)

    best = max(range(8), key=rate)
    lengths = run(Pace(False), 600, confidence=right, right=right, step=step, row=row)[40:]
    assert abs(sum(lengths) / len(lengths) - best) <= 1


def test_drafts_that_never_pay_cost_little() -> None:
    pace = Pace(False)
    # The draft is sure and always wrong, and as slow as the model.
    lengths = run(pace, 2000, confidence=0.95, right=0, step=1.0, row=0.3)
    assert sum(lengths) < 20
    assert sum(length > 0 for length in lengths[1000:]) <= 2


def test_pauses_end() -> None:
    pace = Pace(False)
    run(pace, 300, confidence=0.95, right=0, step=0.5, row=0.3)
    lengths = run(pace, 1500, confidence=0.95, right=1, step=0.05, row=0.02)
    assert sum(lengths[-40:]) / 40 > 5


def test_fixed_drafts_are_never_shorter() -> None:
    assert set(run(Pace(True), 100, confidence=0.05, right=0, step=2, row=1)) == {7}


def test_mean_forgets() -> None:
    mean = Mean(4)
    assert not mean.is_known
    mean.add(2)
    mean.add(4)
    assert (mean.is_known, mean.value) == (True, 3)
    for _ in range(40):
        mean.add(10)
    assert mean.value == pytest.approx(10, abs=0.01)
