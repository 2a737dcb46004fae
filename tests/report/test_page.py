"""report.html for those who look at it, listen to it, print it, or try to break it."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from formats import recipe_of
from reports import sample_report, sample_run

import shiftadd_cli
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.recipe_file import packaged_names
from shiftadd_cli.report.page import Run, render_page

PAGES = {
    "mixed": lambda: [sample_run()],
    "uniform": lambda: [sample_run(mixed=False)],
    "weights only": lambda: [sample_run(calibrated=False)],
    "not evaluated": lambda: [
        Run("out", sample_report(blocks=[], distillation=None, tables=[], kept=[]), sample_run().cost)
    ],
    "two": lambda: [sample_run("one"), sample_run("two", calibrated=False)],
    "six": lambda: [sample_run(f"run {index}") for index in range(6)],
}
STYLE = Path(shiftadd_cli.__file__).parent / "report" / "templates" / "style.css"


def parse(page: str) -> ElementTree.Element:
    """Parse the page strictly: it is also valid XML."""
    assert page.startswith("<!DOCTYPE html>\n")
    return ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>"))


def child(element: ElementTree.Element, path: str) -> ElementTree.Element:
    result = element.find(path)
    assert result is not None
    return result


def texts(element: ElementTree.Element, tag: str) -> list[str]:
    return ["".join(tagged.itertext()).strip() for tagged in element.iter(tag)]


@pytest.fixture(params=PAGES, scope="module")
def page(request: pytest.FixtureRequest) -> ElementTree.Element:
    return parse(render_page(PAGES[request.param]()))


def test_headings_start_with_the_only_h1_and_skip_no_level(page: ElementTree.Element) -> None:
    levels = [int(element.tag[1]) for element in page.iter() if re.fullmatch("h[1-6]", element.tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_drawings_have_titles_and_descriptions(page: ElementTree.Element) -> None:
    ids = [element.attrib["id"] for element in page.iter() if "id" in element.attrib]
    assert len(ids) == len(set(ids))
    drawings = [drawing for drawing in page.iter("svg") if drawing.get("aria-hidden") != "true"]
    assert drawings
    for drawing in drawings:
        assert drawing.get("role") == "img"
        title, description = drawing.attrib["aria-labelledby"].split()
        assert child(drawing, f"title[@id='{title}']").text
        assert child(drawing, f"desc[@id='{description}']").text


def test_tables_have_captions_and_headings_with_a_scope(page: ElementTree.Element) -> None:
    tables = list(page.iter("table"))
    assert tables
    for table in tables:
        assert child(table, "caption").text
        assert {heading.get("scope") for heading in child(table, "thead").iter("th")} == {"col"}
        assert {heading.get("scope") for heading in child(table, "tbody").iter("th")} == {"row"}
        widths = {len(row) for row in table.iter("tr")}
        assert len(widths) == 1


def test_tables_scroll_instead_of_the_page(page: ElementTree.Element) -> None:
    scrolled = [division for division in page.iter("div") if division.get("class") == "scroll"]
    assert sum(len(division.findall("table")) for division in scrolled) == len(list(page.iter("table")))
    assert all(division.get("tabindex") == "0" and division.get("aria-label") for division in scrolled)
    assert any(meta.get("name") == "viewport" for meta in page.iter("meta"))


def test_page_requests_nothing_from_outside(page: ElementTree.Element) -> None:
    for element in page.iter():
        assert element.tag not in {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
        assert not {"src", "href", "style"} & element.attrib.keys()
        assert not [name for name in element.attrib if name.startswith("on")]
    (style,) = texts(page, "style")
    assert not re.search(r"url\(|@import|@font-face|https?:", style)


def test_lines_differ_by_more_than_colour() -> None:
    page = parse(render_page([sample_run(f"run {index}") for index in range(5)]))
    (drawing,) = (svg for svg in page.iter("svg") if svg.get("role") == "img")
    shapes = set()
    for mark in drawing.iter():
        if mark.get("class", "").startswith("mark"):
            shapes.add((mark.tag, mark.get("d")))
    assert len(shapes) == 5
    dashes = re.findall(r"--dash: ([^;]+);", STYLE.read_text())
    assert len(dashes) == len(set(dashes)) == 5


HOSTILE = "<script>alert(1)</script>\"'&<img src=x onerror=y>{{ 7 * 7 }}]]>"


@pytest.mark.parametrize("count", [1, 2])
def test_names_are_escaped(count: int) -> None:
    source = render_page([sample_run(HOSTILE)] * count)
    page = parse(source)
    assert not list(page.iter("script"))
    assert not list(page.iter("img"))
    assert "<script" not in source
    assert "<img" not in source
    assert any(HOSTILE in text for text in texts(page, "th"))
    assert HOSTILE in "".join(child(page, "body").itertext())


def test_equal_runs_give_equal_pages() -> None:
    assert render_page([sample_run()]) == render_page([sample_run()])
    assert render_page([sample_run()]) != render_page([sample_run(mixed=False)])


def test_page_shows_headline_layers_and_command() -> None:
    page = parse(render_page([sample_run()]))
    (title,) = texts(page, "h1")
    assert title == "sample at 3.250 bits per weight"
    headline = " ".join(texts(page, "dd"))
    assert "5.0 kB" in headline
    assert "4.00 times smaller" in headline
    assert "perplexity 20.000 ± 0.500 the original has 15.000" in headline
    assert "nats a token from it" in headline
    assert "shiftadd quantize sample -o 'out dir'" in texts(page, "pre")
    worst = next(
        table for table in page.iter("table") if "highest output error" in (child(table, "caption").text or "")
    )
    names = texts(child(worst, "tbody"), "th")
    assert names == ["sample.1.q", "sample.1.v", "sample.0.q", "sample.0.v"]
    grid = next(table for table in page.iter("table") if table.get("class") == "grid")
    assert texts(child(grid, "tbody"), "td") == ["2", "3", "2", "3"]


def test_absent_parts_are_not_shown() -> None:
    sections = texts(parse(render_page(PAGES["mixed"]())), "h2")
    optional = {"Quality", "Bits against loss", "Block reconstruction", "Distillation"}
    assert optional <= set(sections)
    plain = Run("out", sample_report(mixed=False, blocks=[], distillation=None), sample_run().cost)
    assert not optional & set(texts(parse(render_page([plain])), "h2"))
    assert "not measured" in render_page([plain])


def test_numbered_parts_of_a_block_share_a_chart() -> None:
    layers = [
        layer.model_copy(update={"kind": f"experts.{index % 2}.up", "block": 0, "bits": 2 + index % 2})
        for index, layer in enumerate(sample_report().layers)
    ]
    page = parse(render_page([Run("out", sample_report(layers=layers), sample_run().cost)]))
    assert texts(page, "figcaption").count("experts.*.up") == 1
    grid = next(table for table in page.iter("table") if table.get("class") == "grid")
    assert texts(child(grid, "tbody"), "td") == ["2-3"]


def test_run_from_python_is_shown_as_an_equivalent_call() -> None:
    run = Run(
        "out",
        sample_report(command=[], recipe=recipe_of(bits=2, skip=("*.q",)).model_dump(mode="json")),
        sample_run().cost,
    )
    assert run.command == "shiftadd_cli.quantize('sample', 'out', 'equal-bits', bits=2, skip=['*.q'])"
    for name in packaged_names():
        recipe = Recipe.load(name, {"seed": 7})
        run = Run("out", sample_report(command=[], recipe=recipe.model_dump(mode="json")), sample_run().cost)
        named = "" if name == "default" else f", {name!r}"
        assert run.command == f"shiftadd_cli.quantize('sample', 'out'{named}, seed=7)"


def schemes(style: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Colours by variable: light, dark over light, print over light."""
    blocks = re.findall(r":root \{([^}]*)\}", style)
    assert len(blocks) == 3
    light, *others = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block)) for block in blocks)
    yield "light", light
    for name, block in zip(("dark", "print"), others, strict=True):
        assert block.keys() == light.keys()
        yield name, block


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_contrast_is_enough_in_every_scheme() -> None:
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    for name, colours in schemes(STYLE.read_text()):
        for ground in ("page", "panel"):
            for ink in ("text", "muted"):
                assert contrast(colours[ink], colours[ground]) >= 4.5, (name, ink, ground)
        for ink in ("accent", "second", "third", "fourth", "fifth"):
            assert contrast(colours[ink], colours["page"]) >= 4.5, (name, ink)
        for level in range(1, 5):
            assert contrast(colours["on-level"], colours[f"level-{level}"]) >= 4.5, (name, level)
