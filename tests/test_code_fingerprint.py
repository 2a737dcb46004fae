"""The fingerprint of the package's code."""

from __future__ import annotations

from pathlib import Path

import pytest

from shiftadd_cli import code_fingerprint as module


def test_fingerprint_depends_only_on_the_text_and_names_of_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PACKAGE", tmp_path)
    (tmp_path / "part").mkdir()
    file = tmp_path / "part" / "one.py"
    file.write_text("x = 1\n")
    first = module.code_fingerprint()
    (tmp_path / "part" / "one.cpython-311.pyc").write_bytes(b"compiled")
    file.touch()
    assert module.code_fingerprint() == first
    file.write_text("x = 2\n")
    second = module.code_fingerprint()
    file.rename(file.with_name("two.py"))
    assert len({first, second, module.code_fingerprint()}) == 3
