"""Texts of the Hugging Face hub, under their usual names in the literature."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from shiftadd_cli.errors import CalibrationError, first_line

PROBE_SECONDS = 5
ENDPOINT = os.environ.get("HF_ENDPOINT", "https://huggingface.co")


@dataclass(frozen=True)
class Corpus:
    """The location of a text, the splits to use, and the way to join its rows into one string."""

    path: str
    splits: dict[str, str]
    column: str
    separator: str
    options: dict[str, Any] = field(default_factory=dict)
    data_files: dict[str, str] | None = None
    max_characters: int | None = None


CORPORA = {
    "wikitext2": Corpus(
        "Salesforce/wikitext",
        {"calibration": "train", "test": "test"},
        "text",
        "\n\n",
        {"name": "wikitext-2-raw-v1"},
    ),
    # One shard is opened and read as far as needed: the whole of C4 has 300 GB.
    "c4": Corpus(
        "allenai/c4",
        {"calibration": "train", "test": "validation"},
        "text",
        "\n\n",
        {"streaming": True},
        {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"},
        max_characters=8_000_000,
    ),
    # The repository itself contains a script, which `datasets` no longer runs; the hub has this converted branch.
    "ptb": Corpus(
        "ptb-text-only/ptb_text_only",
        {"calibration": "train", "test": "test"},
        "sentence",
        " ",
        {"revision": "refs/convert/parquet"},
    ),
}


def read(name: str, split: str) -> tuple[str, str]:
    """Name and text of a corpus in `CORPORA`; `split` is "calibration" or "test".

    Without a network, this uses a copy in the cache of `datasets`; without a copy, it fails within seconds.

    Raises:
        CalibrationError: the text cannot be downloaded; the message says how to pass a file.
    """
    corpus = CORPORA[name]
    part = corpus.splits[split]
    online = reachable(ENDPOINT)
    try:
        with offline(not online):
            rows = _open(corpus, part)
            text, is_complete = _join((row[corpus.column] for row in rows), corpus.separator, corpus.max_characters)
    # A dozen libraries are involved in reaching the hub; whatever goes wrong, the remedy is the same.
    except Exception as error:
        reason = first_line(error)
        raise CalibrationError(
            f"The text {name} ({corpus.path} on the hub) could not be downloaded: "
            f"{reason if online else 'the hub cannot be reached, and the cache has no copy'}; pass a .txt, .jsonl or "
            ".parquet file instead, or 'builtin', which needs no download."
        ) from error
    return f"{name} {part}" + ("" if is_complete else f" (first {len(text)} characters)"), text


def _open(corpus: Corpus, part: str) -> Any:
    import datasets

    files = None if corpus.data_files is None else {part: corpus.data_files[part]}
    return datasets.load_dataset(corpus.path, split=part, data_files=files, **corpus.options)


def _join(rows: Iterable[str], separator: str, limit: int | None) -> tuple[str, bool]:
    """The rows joined, up to at least `limit` characters, and whether these were all rows."""
    parts: list[str] = []
    used = 0
    for row in rows:
        if limit is not None and used >= limit:
            return separator.join(parts), False
        parts.append(row)
        used += len(row)
    return separator.join(parts), True


@contextmanager
def offline(wanted: bool) -> Iterator[None]:
    """Without a network, `datasets` retries for half a minute; in offline mode it uses its cache immediately."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or wanted
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def reachable(url: str) -> bool:
    """Whether a server answers, even with an error; honours the usual proxy variables and HF_HUB_OFFLINE."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return False
    try:
        with urlopen(Request(url, method="HEAD"), timeout=PROBE_SECONDS):
            return True
    except HTTPError:
        return True
    except URLError as error:
        # The hub's client has its own certificates, so it may connect where this one cannot.
        return isinstance(error.reason, ssl.SSLError)
    except (OSError, ValueError):  # ValueError: the address is invalid
        return False
