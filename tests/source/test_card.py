from __future__ import annotations

import pytest
from tiny_models import save_tiny_gguf

from shiftadd_cli.source.card import source_license
from shiftadd_cli.source.locate import hub_id


@pytest.mark.parametrize(
    ("card", "license"),
    [
        ("---\nlicense: apache-2.0\nlanguage: en\n---\n# Model\n", "apache-2.0"),
        ("---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("# Model\n---\nlicense: mit\n---\n", None),
        ("---\nlicense: [mit]\n---\n", None),
        ("---\nlicense: {\n---\n", None),
        ("---\n- 1\n---\n", None),
        ("", None),
    ],
)
def test_the_licence_is_that_of_the_front_matter(tmp_path, card, license):
    (tmp_path / "README.md").write_bytes(card.encode())
    assert source_license(tmp_path) == license


def test_no_card_and_no_licence_in_a_file(tmp_path):
    assert source_license(tmp_path) is None
    save_tiny_gguf(tmp_path / "model.gguf")
    assert source_license(tmp_path / "model.gguf") is None


def test_a_hub_id_is_what_is_nothing_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_id("owner/name") == "owner/name"
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert [hub_id(spec) for spec in ("owner/name", "demo", "./owner", "a/b/c", "model file.gguf")] == [None] * 5
