"""A text that comes with every Python: the language reference in `pydoc_data.topics` of the standard library.

In Python 3.11 it has about 370 000 characters of English prose and code, 90 000 tokens. Its topics quote one another,
so only the first occurrence of a paragraph is used, and no paragraph is in both splits.
"""

from __future__ import annotations

import hashlib
import platform
import re
from functools import lru_cache
from pydoc_data.topics import topics

NAME = "builtin"
TEST_SHARE = 0.1

_BLANK_LINES = re.compile(r"\n[ \t]*\n\s*?(?=[^\n])")
_RULE = re.compile(r"^[ \t]*([*=~^\"+#-])\1{2,}[ \t]*$", re.MULTILINE)
_SOFT_BREAK = re.compile(r"\n(?=[^\s|])(?![*+-] )")


def read(split: str) -> tuple[str, str]:
    """Name and text of a split, "calibration" or "test"; both depend only on the Python version."""
    calibration, test = _splits()
    part = "a tenth of the topics, held out" if split == "test" else "without the held-out topics"
    version = ".".join(platform.python_version_tuple()[:2])
    name = f"builtin (documentation of Python {version}, {part})"
    return name, "\n\n".join(test if split == "test" else calibration)


@lru_cache(maxsize=1)
def _splits() -> tuple[list[str], list[str]]:
    """Paragraphs for calibration and for testing, in the order of the topics' names."""
    by_topic = {topic: _paragraphs(text) for topic, text in sorted(topics.items())}
    unique: dict[str, str] = {}
    for paragraphs in by_topic.values():
        unique.update((words, text) for words, text in paragraphs.items() if words not in unique)
    limit = TEST_SHARE * sum(map(len, unique.values()))
    held_out: set[str] = set()
    size = 0
    # Hash order is effectively random, and the same everywhere.
    for topic in sorted(by_topic, key=lambda name: hashlib.sha256(name.encode()).digest()):
        more = by_topic[topic].keys() - held_out
        growth = sum(len(unique[words]) for words in more)
        if size + growth <= limit:
            held_out |= more
            size += growth
    return (
        [text for words, text in unique.items() if words not in held_out],
        [text for words, text in unique.items() if words in held_out],
    )


def _paragraphs(text: str) -> dict[str, str]:
    """Paragraphs by their words, because topics quote one another with other indents and line breaks.

    Underlines are removed. Lines of prose, which starts at the margin, are joined.
    """
    blocks = (block.rstrip().strip("\n") for block in _BLANK_LINES.split(_RULE.sub("", text)))
    joined = (block if block[0].isspace() else _SOFT_BREAK.sub(" ", block) for block in blocks if block)
    return {" ".join(block.split()): block for block in joined}
