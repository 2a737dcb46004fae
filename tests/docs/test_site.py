"""Pages agree with the code and the measured rows, and build into a site without warnings."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import generate_docs
import pytest
from pages.measured import command_of, measured_names

from shiftadd_cli.cli import VERBS
from shiftadd_cli.cli.options import option_name
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.recipe_file import packaged_names


@pytest.fixture(scope="module")
def docs(repository: Path) -> dict[str, str]:
    """The text of every page, by the name of its file."""
    return {path.name: path.read_text(encoding="utf-8") for path in sorted((repository / "docs").glob("*.md"))}


def test_generated_parts_are_current(repository: Path) -> None:
    check = [sys.executable, str(repository / "scripts" / "generate_docs.py"), "--check"]
    result = subprocess.run(check, cwd=repository, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_stale_parts_are_regenerated_and_the_rest_is_kept() -> None:
    page = "Before.\n<!-- generated: errors -->\nstale words\n<!-- end of generated -->\nAfter.\n"
    updated = generate_docs.regenerated(page)
    assert updated.startswith("Before.\n<!-- generated: errors -->\n| error |")
    assert updated.endswith("<!-- end of generated -->\nAfter.\n")
    assert "stale words" not in updated
    assert generate_docs.regenerated(updated) == updated
    with pytest.raises(SystemExit, match="no end"):
        generate_docs.regenerated("<!-- generated: errors -->\n")


def test_every_verb_recipe_and_row_is_on_a_page(docs: dict[str, str]) -> None:
    parts = [part for page in docs.values() for part in generate_docs.parts_of(page)]
    assert [part for part in parts if part.startswith("verb ")] == [f"verb {name}" for name in VERBS]
    shown = {part.partition(" ")[2] for part in parts if part.partition(" ")[0] in ("measured", "calibration")}
    assert shown == set(measured_names())
    assert {"options", "errors", "gallery", "verbs"} <= set(parts)
    assert set(re.findall(r"^### `([a-z-]+)`", docs["gallery.md"], flags=re.MULTILINE)) == set(packaged_names())


def test_every_field_has_its_row(docs: dict[str, str]) -> None:
    options = docs["commands.md"].partition("## Options of the recipe")[2]
    rows = re.findall(r"^\| `(--[a-z-]+)` \|", options, flags=re.MULTILINE)
    assert rows == [option_name(name) for name in Recipe.model_fields]


def test_options_named_on_pages_exist(docs: dict[str, str]) -> None:
    mentioned = {
        name for page in docs.values() for name in re.findall(r"shiftadd [a-z-]+[^`\n]*?(--[a-z][a-z-]+)", page)
    }
    existing = set(re.findall(r"--[a-z][a-z-]+", docs["commands.md"]))
    existing |= {f"--no-{name.removeprefix('--')}" for name in existing}
    assert mentioned - existing - {"--help"} == set()


def test_rows_are_named_by_the_command_that_gives_them_now() -> None:
    """Defaults change while rows stay, so a row with another default names it."""
    fields = Recipe.load("equal-bits").model_dump(mode="json")
    row = {"method": "equal-bits", "bits": 3, "settings": {"artifact": {"recipe": fields}}}
    assert command_of(row) == "`equal-bits --bits 3`"
    row["settings"] = {"artifact": {"recipe": fields | {"asymmetric": 0.0, "row_scale": False, "seed": 7}}}
    assert command_of(row) == "`equal-bits --bits 3 --asymmetric 0.0 --no-row-scale`"
    row["settings"] = {"artifact": {"recipe": fields | {"avg_bits": 2.25, "candidates": [2, 3]}}}
    assert command_of(row) == "`equal-bits --avg-bits 2.25 --candidates 2,3`"
    row["settings"] = {"artifact": {"recipe": fields | {"bits": None, "target_size": "60MB"}}}
    assert command_of(row) == "`equal-bits --target-size 60MB`"


def test_documented_exit_codes_match_the_code(docs: dict[str, str]) -> None:
    from shiftadd_cli import cli

    documented = set(re.findall(r"^\| (\d+) \|", docs["running.md"], flags=re.MULTILINE))
    assert documented == {"0", "1", "2", "3", "130", "143"}
    assert {"0", "2", "3", "130", "143"} <= set(re.findall(r"\d+", cli.__doc__ or ""))


def test_every_page_is_in_the_navigation(docs: dict[str, str], repository: Path) -> None:
    listed = re.findall(r": ([a-z-]+\.md)$", (repository / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(docs)


def test_pictures_exist_and_are_used(docs: dict[str, str], repository: Path) -> None:
    used = {name for page in docs.values() for name in re.findall(r"\]\(pictures/([a-z-]+\.svg)\)", page)}
    assert used == {path.name for path in (repository / "docs" / "pictures").iterdir()}


def test_site_builds_without_a_warning(repository: Path, tmp_path: Path) -> None:
    """Broken links, anchors and pages outside the navigation are warnings."""
    if importlib.util.find_spec("material") is None:
        pytest.skip("mkdocs-material is not installed: pip install '.[docs]'")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(build, cwd=repository, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "site" / "format.html").is_file()
