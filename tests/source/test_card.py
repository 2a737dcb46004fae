from __future__ import annotations

from pathlib import Path

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
def test_license_comes_from_the_front_matter(tmp_path: Path, card: str, license: str | None) -> None:
    (tmp_path / "README.md").write_bytes(card.encode())
    assert source_license(tmp_path) == license


def test_missing_card_and_gguf_file_have_no_license(tmp_path: Path) -> None:
    assert source_license(tmp_path) is None
    save_tiny_gguf(tmp_path / "model.gguf")
    assert source_license(tmp_path / "model.gguf") is None


def test_hub_id_is_a_spec_that_does_not_exist_locally(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_id("owner/name") == "owner/name"
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert [hub_id(spec) for spec in ("owner/name", "demo", "./owner", "a/b/c", "model file.gguf")] == [None] * 5
