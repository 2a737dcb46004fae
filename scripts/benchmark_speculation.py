"""Measures drafted decoding: how much faster it is, and how often the text is that of plain decoding.

The speed is measured on four kinds of prompts: prose, code, a list, and a text to be repeated. Every prompt is
continued plainly and with each draft in turn, several times; a row has the medians. For the agreement, prompts are cut
from a text, and each continuation is compared token by token. Where two differ, the script computes how far apart the
logits of the two tokens are in float32, in units of the last place of the largest logit.

    python scripts/benchmark_speculation.py demo --draft out/3bit --draft out/2bit --draft lookup \\
        --text brown-test.txt --work out/speculation
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import click
import torch

from shiftadd_cli.cli.flags import usage_error
from shiftadd_cli.cli.summary import table
from shiftadd_cli.device import use_threads
from shiftadd_cli.errors import ShiftaddError
from shiftadd_cli.generation.drafts import Drafter, OpenedDraft, open_draft
from shiftadd_cli.generation.prompt import Prompt, encode_prompt
from shiftadd_cli.generation.run import Generated, generate_text
from shiftadd_cli.generation.sampling import Sampling
from shiftadd_cli.runtime.opened import Loaded, Opened, open_any

_CPU = torch.device("cpu")
_PASSAGE = (
    "The lighthouse stood at the end of a long stone pier. Every evening, an old keeper climbed its ninety-two steps, "
    "trimmed the wick, and wrote the weather into a book. In winter the waves reached the lowest window, and he "
    "counted them to stay awake. When the harbour got electric light, the town thanked him with a clock."
)
PROMPTS = {
    "prose": (
        "Write a short story about a painter who loses her favourite brush.",
        "Describe how a river changes from its source to the sea.",
        "Explain to a child why the sky is blue.",
    ),
    "code": (
        "Write a Python function that returns the prime numbers below n.",
        "Write a Python class for a stack with push, pop and peek.",
        "Write an HTML page with a heading, a list of three links and a footer.",
    ),
    "list": (
        "List the planets of the solar system, with one fact about each.",
        "Give ten tips for saving energy at home.",
        "List the months of the year and a holiday in each.",
    ),
    "copy": tuple(
        f"{request}\n\n{_PASSAGE}"
        for request in (
            "Repeat the following text word for word.",
            "Correct the spelling of the following text and print all of it.",
            "Print the following text again, with each sentence on its own line.",
        )
    ),
}


@dataclass(frozen=True)
class Speed:
    """Medians over the prompts and repetitions of one kind.

    Attributes:
        accepted: share of the drafted tokens; drafted: per new token.
        plain, drafted_speed: new tokens per second without and with drafts; ratio: median of their ratios.
    """

    kind: str
    draft: str
    accepted: float
    drafted: float
    plain: float
    drafted_speed: float
    ratio: float


@dataclass(frozen=True)
class Agreement:
    """Continuations that are those of plain decoding, token by token.

    Attributes:
        close_calls: counted by the command, per text.
        distances: for each text that differs, the distance of the two logits at the first different token.
    """

    draft: str
    dtype: str
    texts: int
    same: int
    close_calls: float
    distances: tuple[float, ...]


def load_drafts(drafts: Mapping[str, OpenedDraft], dtype: str, sampling: Sampling) -> dict[str, Drafter]:
    return {name: draft.load(dtype, _CPU, sampling) for name, draft in drafts.items()}


def measure_speed(loaded: Loaded, drafts: Mapping[str, OpenedDraft], new_tokens: int, repeats: int) -> Iterator[Speed]:
    """One row per kind of prompt and draft; drafts: by the names that the user typed."""
    sampling = Sampling(max_new_tokens=new_tokens)
    drafters = load_drafts(drafts, "auto", sampling)
    for kind, texts in PROMPTS.items():
        plain: list[float] = []
        runs: dict[str, list[tuple[Generated, float]]] = {name: [] for name in drafters}
        for text in texts:
            prompt = encode_prompt(text, loaded.tokenizer, name=loaded.info.spec)
            for _ in range(repeats):
                rate = generate_text(loaded, prompt, sampling).decode_rate or 0.0
                plain.append(rate)
                for name, drafter in drafters.items():
                    runs[name].append((generate_text(loaded, prompt, sampling, drafter=drafter), rate))
        for name, pairs in runs.items():
            accounts = [generated.speculated for generated, _ in pairs if generated.speculated is not None]
            drafted = sum(account.drafted for account in accounts)
            rates = [generated.decode_rate or 0.0 for generated, _ in pairs]
            yield Speed(
                kind=kind,
                draft=name,
                accepted=sum(account.accepted for account in accounts) / max(1, drafted),
                drafted=drafted / sum(generated.new_tokens for generated, _ in pairs),
                plain=median(plain),
                drafted_speed=median(rates),
                ratio=median(rate / alone for rate, (_, alone) in zip(rates, pairs, strict=True)),
            )


def measure_agreement(
    opened: Opened, drafts: Mapping[str, OpenedDraft], prompts: Sequence[Prompt], new_tokens: int, dtype: str
) -> Iterator[Agreement]:
    """One row per draft."""
    sampling = Sampling(max_new_tokens=new_tokens)
    loaded, reference = opened.load(dtype, _CPU), opened.load("float32", _CPU)
    plain = [generate_text(loaded, prompt, sampling).tokens for prompt in prompts]
    for name, drafter in load_drafts(drafts, dtype, sampling).items():
        same, close, distances = 0, 0, []
        for prompt, expected in zip(prompts, plain, strict=True):
            generated = generate_text(loaded, prompt, sampling, drafter=drafter)
            assert generated.speculated is not None
            close += generated.speculated.close_calls
            if generated.tokens == expected:
                same += 1
                continue
            both = list(zip(generated.tokens, expected, strict=False))
            first = next(index for index, (one, other) in enumerate(both) if one != other)
            text = torch.tensor([[*prompt.ids, *expected[:first]]])
            with torch.no_grad():
                logits = reference.model(input_ids=text).logits[0, -1]
            # The last place of a bfloat16 or float32 number of the size of the largest logit.
            unit = float(logits.abs().max()) * torch.finfo(loaded.model.dtype).eps
            one, other = both[first]
            distances.append(abs(float(logits[one] - logits[other])) / unit)
        yield Agreement(name, loaded.info.dtype, len(prompts), same, close / len(prompts), tuple(distances))


def cut_prompts(file: Path, opened: Opened, count: int, tokens: int) -> list[Prompt]:
    """`count` prompts of `tokens` tokens, evenly spread over a text."""
    tokenizer = opened.load_tokenizer()
    ids = encode_prompt(file.read_text(encoding="utf-8"), tokenizer, name=opened.spec, chat=False).ids
    step = (len(ids) - tokens) // count
    if step < 1:
        raise click.UsageError(f"{file} is too short for {count} prompts of {tokens} tokens.")
    return [Prompt(ids[start : start + tokens], chat=False) for start in range(0, step * count, step)]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.option("--draft", "specs", multiple=True, required=True, help="A draft, as for `shiftadd generate`.")
@click.option("--new-tokens", type=click.IntRange(min=8), default=128, show_default=True, help="Tokens per text.")
@click.option("--repeats", type=click.IntRange(min=0), default=3, show_default=True, help="Repetitions; 0: no speed.")
@click.option("--text", type=click.Path(exists=True, path_type=Path), help="Text that prompts are cut from.")
@click.option("--prompts", type=click.IntRange(min=1), default=200, show_default=True, help="Prompts from the text.")
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=32, show_default=True, help="Tokens per prompt.")
@click.option("--agreement-tokens", default=32, show_default=True, help="New tokens of each of these prompts.")
@click.option("--dtypes", default="float32,bfloat16", show_default=True, help="Dtypes of the agreement.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("out/speculation"), show_default=True)
def main(
    model: str,
    specs: tuple[str, ...],
    new_tokens: int,
    repeats: int,
    text: Path | None,
    prompts: int,
    prompt_tokens: int,
    agreement_tokens: int,
    dtypes: str,
    threads: int | None,
    work: Path,
) -> None:
    """Measure MODEL (an original, or a folder of ours) with drafts."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    use_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    rows: list[Agreement] = []
    try:
        opened = open_any(model)
        drafts = {spec: draft for spec in specs if (draft := open_draft(spec, opened)) is not None}
        if repeats:
            speeds = list(measure_speed(opened.load(), drafts, new_tokens, repeats))
            (work / "speed.json").write_text(json.dumps([asdict(row) for row in speeds], indent=2))
            click.echo(describe_speed(speeds))
        if text is not None:
            parts = cut_prompts(text, opened, prompts, prompt_tokens)
            for dtype in dtypes.split(","):
                rows += measure_agreement(opened, drafts, parts, agreement_tokens, dtype)
            (work / "agreement.json").write_text(json.dumps([asdict(row) for row in rows], indent=2))
            click.echo(describe_agreement(rows))
    except ShiftaddError as error:
        raise usage_error(error) from error
    # Where no number is rounded to 16 bits, a different text is an error.
    if any(row.same < row.texts for row in rows if row.dtype == "float32"):
        sys.exit(1)


def describe_speed(rows: Sequence[Speed]) -> str:
    header = ("prompt", "draft", "drafted per token", "accepted", "plain, tokens/s", "drafted, tokens/s", "ratio")
    return table(
        header,
        [
            (
                row.kind,
                row.draft,
                f"{row.drafted:.2f}",
                f"{row.accepted:.0%}",
                f"{row.plain:.1f}",
                f"{row.drafted_speed:.1f}",
                f"{row.ratio:.2f}",
            )
            for row in rows
        ],
    )


def describe_agreement(rows: Sequence[Agreement]) -> str:
    header = ("draft", "dtype", "same texts", "close calls per text", "median distance", "largest distance")
    return table(
        header,
        [
            (
                row.draft,
                row.dtype,
                f"{row.same} of {row.texts}",
                f"{row.close_calls:.2f}",
                f"{median(row.distances):.2f}" if row.distances else "-",
                f"{max(row.distances):.2f}" if row.distances else "-",
            )
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
