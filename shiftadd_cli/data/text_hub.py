"""Texts of the Hugging Face hub, by the names the literature uses for them."""

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
    """Where a text lies, which splits to take, and how its rows become one string."""

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
    # One shard is opened and read as far as needed: all of C4 has 300 GB.
    "c4": Corpus(
        "allenai/c4",
        {"calibration": "train", "test": "validation"},
        "text",
        "\n\n",
        {"streaming": True},
        {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"},
        max_characters=8_000_000,
    ),
    # The repository itself holds a script, which `datasets` no longer runs; the hub keeps this converted branch.
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

    Without network, a copy in the cache of `datasets` is used if there is one, and otherwise this fails in seconds.

    Raises:
        CalibrationError: the text cannot be had; says how to pass a file.
    """
    corpus = CORPORA[name]
    part = corpus.splits[split]
    online = reachable(ENDPOINT)
    try:
        with offline(not online):
            rows = _open(corpus, part)
            text, whole = _join((row[corpus.column] for row in rows), corpus.separator, corpus.max_characters)
    # Whatever goes wrong on the way to the hub (there are a dozen libraries on it), the cure is the same.
    except Exception as error:
        reason = first_line(error)
        raise CalibrationError(
            f"The text {name} ({corpus.path} on the hub) could not be had: "
            f"{reason if online else 'the hub cannot be reached, and the cache has no copy'}; pass a .txt, .jsonl or "
            ".parquet file instead, or 'builtin', which needs no download."
        ) from error
    return f"{name} {part}" + ("" if whole else f" (first {len(text)} characters)"), text


def _open(corpus: Corpus, part: str) -> Any:
    import datasets

    files = None if corpus.data_files is None else {part: corpus.data_files[part]}
    return datasets.load_dataset(corpus.path, split=part, data_files=files, **corpus.options)


def _join(rows: Iterable[str], separator: str, limit: int | None) -> tuple[str, bool]:
    """Rows joined up to at least `limit` characters, and whether that was all of them."""
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
    """Without network `datasets` would retry for half a minute; in its offline mode it looks into its cache at once."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or wanted
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def reachable(url: str) -> bool:
    """Whether a server answers, be it with an error; honours the usual proxy variables and HF_HUB_OFFLINE."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return False
    try:
        with urlopen(Request(url, method="HEAD"), timeout=PROBE_SECONDS):
            return True
    except HTTPError:
        return True
    except URLError as error:
        # Certificates may be found by the hub's client, which brings its own, and not by this one.
        return isinstance(error.reason, ssl.SSLError)
    except (OSError, ValueError):  # the second for an address that is none
        return False
