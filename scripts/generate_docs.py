"""Rewrites the generated parts of README.md and docs/; `--check` only says whether they are current.

A part lies between two markers:

    <!-- generated: verb quantize -->
    <!-- end of generated -->

The first word is a key of `PARTS`; the others are arguments of that function.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from pages.commands import error_table, option_table, verb_reference, verb_table
from pages.gallery import recipe_gallery
from pages.measured import calibration_table, measured_table, quality_table, size_table

ROOT = Path(__file__).resolve().parent.parent
PARTS: dict[str, Callable[..., str]] = {
    "calibration": calibration_table,
    "errors": error_table,
    "measured": measured_table,
    "options": option_table,
    "quality": quality_table,
    "gallery": recipe_gallery,
    "sizes": size_table,
    "verb": verb_reference,
    "verbs": verb_table,
}
_BREAK = "\n"
_PART = re.compile(r"(<!-- generated: (?P<what>[^\n]+) -->\n).*?(<!-- end of generated -->\n)", re.DOTALL)


def pages() -> list[Path]:
    """Every page that may hold generated parts."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def parts_of(text: str) -> list[str]:
    """The generated parts of a page, in order, such as `verb quantize`."""
    return [match["what"] for match in _PART.finditer(text)]


def regenerated(text: str) -> str:
    """`text` with every part between markers regenerated from the current code and rows."""

    def make(match: re.Match[str]) -> str:
        name, *arguments = match["what"].split()
        return f"{match[1]}{PARTS[name](*arguments).strip(_BREAK)}\n{match[3]}"

    if text.count("<!-- generated: ") != len(parts_of(text)):
        raise SystemExit("A generated part has no end: close it with <!-- end of generated -->")
    return _PART.sub(make, text)


def main() -> None:
    check, stale = "--check" in sys.argv[1:], []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        current = regenerated(text)
        if text != current:
            stale.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(current, encoding="utf-8")
    if check and stale:
        raise SystemExit(f"Out of date: {', '.join(stale)}; run `make docs`.")
    for name in stale:
        print(f"Written: {name}")


if __name__ == "__main__":
    main()
