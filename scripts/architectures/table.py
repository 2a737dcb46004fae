"""The outcomes as a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import get_args

import transformers

from architectures.check import Outcome, Status

_ABOUT = f"""# Architectures

This page lists every class that transformers maps to causal language models and to image classifiers, and says whether
`shiftadd quantize` takes it. `scripts/check_architectures.py` writes it. For each class the script builds the smallest
random model that has every kind of its layers, quantizes it with `--recipe equal-bits --bits 3`, and loads the result
with transformers. *Right* means three things: calibration gave every compressed layer the same numbers as the model's
own forward does, all tensors that are not compressed kept their values, and the loaded result gives the same logits as
its dense export. *Partial* is right too, but less than half of the weights of linear layers are compressed. *Refused*
means that the run ends with the quoted sentence and writes nothing. *Broken* means that the run fails in another way or
that its result is wrong. *Not built* are classes without a model in this script. The share is the part of the weights
of all linear layers, without the output head, that was compressed. These small models show that an architecture is
computed right; they say nothing about its quality at a given size. The version of transformers was
{transformers.__version__}.
"""


def summary(outcomes: Sequence[Outcome]) -> str:
    """The number of classes of each status, in one line."""
    counts = Counter(outcome.status for outcome in outcomes)
    parts = [f"{counts[status]} {status}" for status in get_args(Status) if counts[status]]
    return f"{len(outcomes)} classes: {', '.join(parts)}."


def as_markdown(outcomes: Sequence[Outcome], images: Sequence[str] = ()) -> str:
    """Tables of the language models and of the image classifiers, whose names are `images`."""
    texts = [outcome for outcome in outcomes if outcome.name not in images]
    pictures = [outcome for outcome in outcomes if outcome.name in images]
    sections = [("Language models", texts), ("Image classifiers", pictures)]
    return "\n".join(_section(title, rows) for title, rows in sections if rows)


def as_page(outcomes: Sequence[Outcome], images: Sequence[str] = ()) -> str:
    """docs/architectures.md."""
    return f"{_ABOUT}\n{as_markdown(outcomes, images)}"


def _section(title: str, outcomes: Sequence[Outcome]) -> str:
    lines = [
        f"## {title}",
        "",
        summary(outcomes),
        "",
        "| Class | Status | Compressed | Note |",
        "| --- | --- | ---: | --- |",
    ]
    for outcome in sorted(outcomes, key=lambda outcome: outcome.name.lower()):
        share = "" if outcome.share is None else f"{100 * outcome.share:.0f} %"
        note = outcome.note.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")
        lines.append(f"| {outcome.name} | {outcome.status} | {share} | {note} |")
    return "\n".join(lines) + "\n"
