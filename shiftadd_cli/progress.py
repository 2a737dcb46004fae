"""Progress of a long loop on standard error: a bar on a terminal, occasional lines elsewhere, nothing if quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

from shiftadd_cli.verbosity import Verbosity, tell, verbosity

T = TypeVar("T")


class BlockProgress(Protocol):
    """Yields the names of blocks and shows, under a description, how many are done: `block_bar` or a caller's own."""

    def __call__(self, names: Sequence[str], text: str, /) -> Iterable[str]: ...


LINE_SECONDS = 30.0
LINE_SHARE = 0.1
# A loop that ends quickly gets a single line.
LINE_PAUSE = 2.0


def progress(iterable: Iterable[T], total: int, desc: str) -> Iterator[T]:
    """Yield the `total` items of `iterable`, and show how many are done and the time left.

    On a terminal this is tqdm's bar. Elsewhere (a file, a CI log) it writes a line after every tenth of the items, but
    at least 2 seconds after the last line; also 30 seconds after the last line, and at the end.
    """
    if verbosity() is Verbosity.QUIET:
        return iter(iterable)
    if sys.stderr.isatty():
        from tqdm import tqdm

        return iter(tqdm(iterable, total=total, desc=desc, file=sys.stderr, dynamic_ncols=True))
    return _lines(iterable, total, desc)


def block_bar(names: Sequence[str], text: str) -> Iterator[str]:
    """`progress` over the names of a model's blocks."""
    return progress(names, total=len(names), desc=text)


def silent(names: Sequence[str], text: str) -> Sequence[str]:
    """The names, with no progress shown."""
    return names


@contextmanager
def no_library_bar() -> Iterator[None]:
    """Turn off the progress bars of transformers inside the context."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def duration(seconds: float) -> str:
    """`45 s`, `3 min 05 s` or `2 h 07 min`."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02} s"
    return f"{total // 3600} h {total % 3600 // 60:02} min"


def _lines(iterable: Iterable[T], total: int, desc: str) -> Iterator[T]:
    start = shown_at = time.monotonic()
    shown_share = 0.0
    for done, item in enumerate(iterable, start=1):
        yield item
        now, share = time.monotonic(), done / total
        # The tolerance absorbs rounding: 0.3 - 0.2 is slightly less than a tenth.
        tenth = share >= shown_share + LINE_SHARE - 1e-9 and now >= shown_at + LINE_PAUSE
        if tenth or now >= shown_at + LINE_SECONDS or done == total:
            passed = now - start
            left = f"{duration(passed)} in all" if done == total else f"{duration(passed / share - passed)} left"
            tell(f"{desc}: {done}/{total} ({share:.0%}), {left}")
            shown_at, shown_share = now, share
