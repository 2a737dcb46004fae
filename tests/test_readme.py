from __future__ import annotations

import re
from pathlib import Path

import pytest

from shiftadd_cli.recipe_file import packaged_names


@pytest.fixture(scope="module")
def readme(repository: Path) -> str:
    return (repository / "README.md").read_text(encoding="utf-8")


def test_every_page_of_the_manual_is_linked(readme: str, repository: Path) -> None:
    pages = {path.name for path in (repository / "docs").glob("*.md")} - {"index.md"}
    assert set(re.findall(r"\]\(docs/([a-z-]+\.md)\)", readme)) >= pages


def test_every_packaged_recipe_is_listed_and_linked(readme: str) -> None:
    assert tuple(sorted(re.findall(r"\(configs/([a-z-]+)\.yaml\)", readme))) == packaged_names()


def test_links_to_files_are_not_broken(readme: str, repository: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", readme)
    assert links
    assert [link for link in links if not (repository / link).exists()] == []


def test_documented_make_targets_exist(readme: str, repository: Path) -> None:
    text = readme + (repository / "CONTRIBUTING.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", (repository / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert {"demo", "test"} <= set(re.findall(r"^    make ([a-z]+)", text, flags=re.MULTILINE)) <= targets
