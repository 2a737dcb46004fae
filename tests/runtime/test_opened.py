"""Originals and compressed checkpoints are opened alike, and described from their files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import VOCAB_SIZE, save_tiny, tiny_model

from shiftadd_cli.errors import ArtifactError, SourceError
from shiftadd_cli.pipeline.job import Job
from shiftadd_cli.pipeline.plan import make_plan
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.runtime import opened as module
from shiftadd_cli.runtime.linear import PackedLinear
from shiftadd_cli.runtime.opened import computing_dtype, load_any, open_any
from shiftadd_cli.source import open_source

CPU = torch.device("cpu")


def compress(source: Path, out: Path) -> Path:
    plan = make_plan(open_source(str(source)), Recipe.load("fast", {"group_size": 16}))
    Job(plan, out).run()
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def original(folder: Path) -> Path:
    return save_tiny("qwen2", folder / "original", sharded=True)


@pytest.fixture(scope="module")
def artifact(original: Path, folder: Path) -> Path:
    return compress(original, folder / "artifact")


def test_original_loads_with_its_sizes(original: Path) -> None:
    model, tokenizer, info = load_any(str(original))
    expected = tiny_model("qwen2")
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected(input_ids=ids).logits)
    assert not model.training
    assert tokenizer.decode(tokenizer("hello")["input_ids"]) == "hello"
    weights = list(original.glob("*.safetensors"))
    assert len(weights) > 1
    assert info.file_bytes == sum(file.stat().st_size for file in weights)
    # This family ties its embeddings, which count once.
    assert info.parameters == sum(parameter.numel() for parameter in expected.parameters())
    assert info.file_bits_per_weight == pytest.approx(8 * info.file_bytes / info.parameters)
    assert 32 < info.file_bits_per_weight < 36
    assert (info.compressed, info.quantized_bits_per_weight, info.calibration) == (False, None, None)
    assert (info.stored_dtype, info.dtype) == ("float32", "float32")


def test_artifact_loads_packed_with_its_sizes(original: Path, artifact: Path) -> None:
    model, _, info = load_any(str(artifact))
    assert any(isinstance(module, PackedLinear) for module in model.modules())
    assert not model.training
    report = json.loads((artifact / "report.json").read_text())
    assert info.compressed
    assert info.parameters == load_any(str(original)).info.parameters == report["source"]["parameters"]
    assert info.file_bytes == report["size"]["files_bytes"]
    assert info.file_bits_per_weight == pytest.approx(report["size"]["whole_file_bits_per_weight"])
    assert info.quantized_bits_per_weight == pytest.approx(report["size"]["bits_per_weight"])
    assert info.calibration is None


def test_calibration_text_comes_from_the_report(artifact: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in artifact.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    report = json.loads((copy / "report.json").read_text())
    report["calibration"] = {"name": "some text", "fingerprint": "abc"}
    (copy / "report.json").write_text(json.dumps(report))
    info = load_any(str(copy)).info
    assert (info.calibration, info.calibration_fingerprint) == ("some text", "abc")
    (copy / "report.json").unlink()
    assert load_any(str(copy)).info.calibration is None
    (copy / "report.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"report\.json is not valid JSON"):
        load_any(str(copy))


def test_truncated_artifact_is_refused(artifact: Path, tmp_path: Path) -> None:
    for file in artifact.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = next(tmp_path.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ArtifactError):
        load_any(str(tmp_path))
    weights.unlink()
    with pytest.raises(ArtifactError):
        load_any(str(tmp_path))


def test_limits_are_available_before_loading(original: Path, artifact: Path, tmp_path: Path) -> None:
    for folder in (original, artifact):
        opened = open_any(str(folder))
        assert (opened.positions, opened.vocab_size, opened.stored_dtype) == (512, VOCAB_SIZE, torch.float32)
        assert opened.load_tokenizer() is opened.load_tokenizer()
    assert open_any(str(save_tiny("bloom", tmp_path / "bloom"))).positions is None


def test_configuration_unknown_to_transformers_is_refused(artifact: Path, tmp_path: Path) -> None:
    config = json.loads((artifact / "config.json").read_text()) | {"model_type": "nonsense"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="cannot be read"):
        assert open_any(str(tmp_path)).positions


@pytest.mark.parametrize("spec", ["/nowhere/at/all", "no-such/model", "missing.gguf"])
def test_missing_model_is_refused_on_opening(spec: str) -> None:
    with pytest.raises(SourceError):
        open_any(spec)


def test_auto_computes_in_the_stored_dtype_only_if_the_machine_can(monkeypatch: pytest.MonkeyPatch) -> None:
    for able, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(module, "computes_in", lambda device, dtype, able=able: able or device != CPU)
        assert computing_dtype("auto", torch.bfloat16, CPU) == expected
        assert computing_dtype("auto", torch.bfloat16, torch.device("cuda")) == torch.bfloat16
        assert computing_dtype("float16", torch.bfloat16, CPU) == torch.float16


def test_model_computes_in_the_requested_dtype(original: Path, artifact: Path) -> None:
    for folder in (original, artifact):
        model, _, info = load_any(str(folder), "bfloat16")
        assert model.dtype == torch.bfloat16
        assert model(input_ids=torch.arange(4).unsqueeze(0)).logits.dtype == torch.bfloat16
        assert (info.stored_dtype, info.dtype) == ("float32", "bfloat16")
