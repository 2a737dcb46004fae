"""The model card: README.md with the hub's metadata, written from report.json."""

from __future__ import annotations

from functools import cache
from typing import Any

import yaml
from jinja2 import Environment

from shiftadd_cli.report.environment import make_environment
from shiftadd_cli.report.page import Run
from shiftadd_cli.report.schema import Report

CARD_FILE = "README.md"
# Characters with a meaning in Markdown or in the HTML inside it.
_SPECIAL = {ord(sign): f"&#{ord(sign)};" for sign in "<>&`*[]|\\#"} | {ord(sign): " " for sign in "\r\n"}


def render_card(run: Run) -> str:
    """Markdown of the card; equal runs give equal text."""
    return (
        _environment()
        .get_template("card.md.jinja")
        .render(metadata=yaml.safe_dump(card_metadata(run.report), sort_keys=False, allow_unicode=True), run=run)
    )


def card_metadata(report: Report) -> dict[str, Any]:
    """The fields of https://huggingface.co/docs/hub/model-cards, with the base model if it has an id on the hub."""
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": _task(report)}
    if report.source.license is not None:
        metadata["license"] = report.source.license
    if report.source.hub_id is not None:
        metadata |= {"base_model": report.source.hub_id, "base_model_relation": "quantized"}
    bits = sorted({layer.bits for layer in report.layers})
    metadata["tags"] = ["shiftadd", "quantized", *(f"{count}-bit" for count in dict.fromkeys((bits[0], bits[-1])))]
    return metadata


def _task(report: Report) -> str:
    if not report.source.reads_images:
        return "text-generation"
    return "image-classification" if "Classification" in report.source.architecture else "image-feature-extraction"


@cache
def _environment() -> Environment:
    environment = make_environment(html=False)
    environment.filters |= {
        "text": lambda value: str(value).translate(_SPECIAL),
        "indent_code": lambda text: "\n".join(f"    {line}".rstrip() for line in text.splitlines()),
    }
    return environment
