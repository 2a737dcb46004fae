"""Writes the table of options in README.md from the fields of `Recipe`; `--check` only says whether it is current."""

from __future__ import annotations

import sys
from pathlib import Path

from shiftadd_cli.cli.options import default_text, option_name
from shiftadd_cli.recipe import Recipe

README = Path(__file__).resolve().parent.parent / "README.md"
START, END = "<!-- options: written by `make docs` -->\n", "<!-- end of options -->\n"


def options_table() -> str:
    """One row per recipe field: option, default, description."""
    rows = ["| option | default | meaning |", "| --- | --- | --- |"]
    for name, field in Recipe.model_fields.items():
        meaning = (field.description or "").replace("|", "\\|")
        rows.append(f"| `{option_name(name)}` | {default_text(field)} | {meaning} |")
    return "\n".join(rows) + "\n"


def with_options(text: str) -> str:
    """`text` with what stands between the two marks replaced by the current table."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise SystemExit(f"README.md lacks the mark {START.strip() if not start else END.strip()}")
    return before + start + options_table() + end + after


def main() -> None:
    text = README.read_text(encoding="utf-8")
    current = with_options(text)
    if "--check" in sys.argv[1:]:
        if text != current:
            raise SystemExit("The option table of README.md is out of date: run `make docs`.")
    else:
        README.write_text(current, encoding="utf-8")


if __name__ == "__main__":
    main()
