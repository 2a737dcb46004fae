from __future__ import annotations

from typing import Any

import pytest
import yaml
from reports import sample_report, sample_run

from shiftadd_cli.report.card import card_metadata, render_card
from shiftadd_cli.report.schema import Report


def parts(card: str) -> tuple[dict[str, Any], str]:
    start, front, body = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(front), body


def report_with_source(**fields: Any) -> Report:
    report = sample_report()
    return report.model_copy(update={"source": report.source.model_copy(update=fields)})


def test_metadata_has_the_fields_of_the_hub() -> None:
    metadata, body = parts(render_card(sample_run()))
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "text-generation"
    assert metadata["tags"] == ["shiftadd", "quantized", "2-bit", "3-bit"]
    assert not {"base_model", "license"} & metadata.keys()
    assert "3.250 in the compressed layers" in body
    assert "    shiftadd quantize sample -o 'out dir'" in body


def test_base_model_and_licence_are_given_if_known() -> None:
    metadata = card_metadata(report_with_source(hub_id="owner/name", license="apache-2.0"))
    assert metadata["base_model"] == "owner/name"
    assert metadata["base_model_relation"] == "quantized"
    assert metadata["license"] == "apache-2.0"


@pytest.mark.parametrize("word", ["<script>alert(1)</script>", "a | b", "x\n---\ny: 1\n", "[link](javascript:1)", "`"])
def test_names_are_escaped(word: str) -> None:
    card = render_card(sample_run(word))
    metadata, body = parts(card)
    assert metadata["library_name"] == "transformers"
    shown = [line for line in body.splitlines() if not line.startswith("    ")]
    assert not [line for line in shown if "<script" in line or "](javascript" in line]
    rows = [line for line in shown if line.startswith("| ") and not line.startswith("| ---")]
    assert {line.count("|") for line in rows if ".q" in line} == {6}


def test_equal_runs_give_equal_cards() -> None:
    assert render_card(sample_run()) == render_card(sample_run())
