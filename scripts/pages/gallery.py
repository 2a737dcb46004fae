"""The packaged recipes, described by the comments in their files."""

from __future__ import annotations

import re

import yaml

from shiftadd_cli.recipe import Recipe
from shiftadd_cli.recipe_file import configs_folder, packaged_names

_ORDER = ("default", "best", "equal-bits", "fast", "shiftaddvit", "shiftaddllm-acc", "shiftaddllm-lat", "gptq", "rtn")
_NOTE = re.compile(r"^# (What|Source|Use it): (.*(?:\n#   .*)*)", re.MULTILINE)


def recipe_gallery() -> str:
    """A section for each recipe: its own comments, and the options in which it differs from the defaults."""
    sections = []
    for name in _names():
        note = notes(name)
        sections.append(
            f"### `{name}`\n\n{_sentence(note['What'])}\n\n*Use it* {note['Use it']}\n\n*From* {note['Source']}\n"
        )
        if differing := _differing(name):
            sections.append("```yaml\n" + differing + "```\n")
    return "\n".join(sections)


def notes(name: str) -> dict[str, str]:
    """The comments `What`, `Source` and `Use it` at the head of a recipe's file."""
    text = (configs_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    return {key: " ".join(value.replace("\n#   ", " ").split()) for key, value in _NOTE.findall(text)}


def _names() -> list[str]:
    """Ours first, then the paper's, then the baselines, then all others."""
    return sorted(packaged_names(), key=lambda name: (*_ORDER, name).index(name))


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _differing(name: str) -> str:
    fields = Recipe.load(name).model_dump(mode="json")
    usual = Recipe.load("default").model_dump(mode="json")
    changed = {key: value for key, value in fields.items() if value != usual[key]}
    return yaml.safe_dump(changed, sort_keys=False, default_flow_style=None) if changed else ""
