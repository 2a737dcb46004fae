"""A stopped run resumes where it was and ends in the same bytes, unless the new request differs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stopped_runs import contents, counting_text, stop_before, stopped
from tiny_models import save_tiny

import shiftadd_cli
from shiftadd_cli.artifact.workspace import Workspace
from shiftadd_cli.artifact.writer import ArtifactWriter
from shiftadd_cli.errors import (
    AllocationError,
    CalibrationError,
    Interrupted,
    NumericalError,
    OutputError,
    ResumeError,
    ShiftaddError,
)
from shiftadd_cli.pipeline import history, job, run, stored_model
from shiftadd_cli.recipe import Recipe

QUICK: dict[str, Any] = {
    "recipe": "equal-bits",
    "samples": 8,
    "seq_len": 24,
    "batch_size": 3,
    "group_size": 16,
    "fit_rounds": 1,
    "refine_rounds": 1,
}
WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "asymmetric": {"asymmetric": 0.5, "drift": 1.0},
    "loss_aware": {"loss_aware": 1.0},
    "reconstruct": {"reconstruct_epochs": 2, "asymmetric": 0.5},
    "distill": {"distill_epochs": 2, "asymmetric": 0.0, "bits": 1, "embedding_bits": "trellis1-4"},
    "no data": {"calibration": "none", "sweep": "none", "refine_rounds": 0, "embedding_bits": 4},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(autouse=True)
def quick_text(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(QUICK, "calibration", str(counting_text(model.parent / "text.txt")))


def partial(out: Path) -> Path:
    return out.parent / f".{out.name}.partial"


@pytest.mark.parametrize("way", WAYS)
def test_run_stopped_at_any_step_ends_in_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    fields = QUICK | {"shard_size": "20KB"} | WAYS[way]
    shiftadd_cli.quantize(str(model), tmp_path / "whole", **fields)
    expected = contents(tmp_path / "whole")
    out = tmp_path / "out"
    # Stopped before the first block, before the second, and before the end, and resumed each time.
    for step in (0, 1, 1):
        stopped(monkeypatch, step, str(model), out, **fields)
        assert not out.exists()
    report = shiftadd_cli.quantize(str(model), out, **fields)
    assert contents(out) == expected
    assert report.seconds.total > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_finished_blocks_are_not_solved_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(monkeypatch, 1, str(model), tmp_path / "out", **QUICK)
    started: list[str] = []
    quantize_block = run.Run.quantize_block

    def quantize(self: run.Run, depth: int, name: str) -> Any:
        started.append(name)
        return quantize_block(self, depth, name)

    monkeypatch.setattr(run.Run, "quantize_block", quantize)
    shiftadd_cli.quantize(str(model), tmp_path / "out", **QUICK)
    assert len(started) == 1


def test_only_the_inputs_of_the_next_block_are_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = QUICK | {"asymmetric": 1.0, "loss_aware": 0.5}
    out = tmp_path / "out"
    stopped(monkeypatch, 0, str(model), out, **fields)
    states = partial(out) / "states"
    names = ["original-00000.safetensors", "quantized-00000.safetensors", "token_weights.safetensors"]
    assert sorted(path.name for path in states.iterdir()) == names
    original, quantized = (load_file(states / name)["hidden_states"] for name in names[:2])
    assert original.shape == quantized.shape
    assert not torch.equal(original, quantized), "the embedding is stored in 8 bits"
    stopped(monkeypatch, 1, str(model), out, **fields)
    files = sorted(path.name for path in states.iterdir())
    assert files == ["original-00001.safetensors", "quantized-00001.safetensors", "token_weights.safetensors"]
    hidden = [load_file(states / name)["hidden_states"] for name in files[:2]]
    assert all(batch.shape[:2] == (QUICK["samples"], QUICK["seq_len"]) for batch in hidden)
    assert not torch.equal(*hidden)


def test_times_include_the_finished_steps(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(monkeypatch, 1, str(model), tmp_path / "out", **QUICK)
    record = json.loads((partial(tmp_path / "out") / "journal" / "block-00000.json").read_text())["record"]
    report = shiftadd_cli.quantize(str(model), tmp_path / "out", **QUICK)
    assert report.seconds.total > record["spent"]["total"] > 0
    assert report.seconds.solve > record["spent"]["seconds"]["solve"] > 0
    assert report.machine.peak_memory_bytes >= record["spent"]["peak_memory_bytes"]


def test_run_with_nothing_to_keep_leaves_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "trace_model", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(Interrupted, match="Nothing was finished"):
        shiftadd_cli.quantize(str(model), tmp_path / "deep" / "out", **QUICK)
    assert not list(tmp_path.iterdir())


def test_disk_space_must_also_fit_the_hidden_states(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = dict(QUICK)
    plan = job.Job.prepare(str(model), tmp_path / "out", Recipe.load(fields.pop("recipe"), fields)).plan
    assert plan.state_bytes > 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=plan.file_bytes + plan.state_bytes - 1))
    with pytest.raises(OutputError, match="MB are needed"):
        shiftadd_cli.quantize(str(model), tmp_path / "out", **QUICK)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [NumericalError, CalibrationError, AllocationError])
def test_runs_that_would_fail_again_are_not_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[ShiftaddError]
) -> None:
    stop_before(monkeypatch, 1, kind("a layer is not finite"))
    with pytest.raises(kind):
        shiftadd_cli.quantize(str(model), tmp_path / "out", **QUICK)
    assert not list(tmp_path.iterdir())


def failed(monkeypatch: pytest.MonkeyPatch, model: Path, out: Path) -> None:
    """Leave behind a run that a defect ended before its second block."""
    with monkeypatch.context() as patch:
        stop_before(patch, 1, RuntimeError("sizes of tensors\ndo not match"))
        with pytest.raises(RuntimeError, match="sizes of tensors"):
            shiftadd_cli.quantize(str(model), out, **QUICK)
    assert partial(out).is_dir()


def test_failed_run_does_not_block_other_options(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, fields = tmp_path / "out", QUICK | {"bits": 2}
    failed(monkeypatch, model, out)
    shiftadd_cli.quantize(str(model), out, **fields)
    assert "other options and failed (sizes of tensors): starting over.\n" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    shiftadd_cli.quantize(str(model), tmp_path / "clean", **fields)
    assert contents(out) == contents(tmp_path / "clean")


def test_failed_run_resumes_with_the_same_options(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed(monkeypatch, model, tmp_path / "out")
    shiftadd_cli.quantize(str(model), tmp_path / "out", **QUICK)
    assert "1 of 2 blocks were done before" in capsys.readouterr().err


def test_failed_run_that_is_then_interrupted_counts_as_interrupted(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed(monkeypatch, model, tmp_path / "out")
    with monkeypatch.context() as patch:
        stop_before(patch, 1, KeyboardInterrupt())
        with pytest.raises(Interrupted):
            shiftadd_cli.quantize(str(model), tmp_path / "out", **QUICK)
    with pytest.raises(ResumeError, match="bits = 3"):
        shiftadd_cli.quantize(str(model), tmp_path / "out", **QUICK | {"bits": 2})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 2}, "bits = 3, and this one has 2"),
        ({"batch_size": 4}, "batch_size = 3"),
        ({"seed": 1}, "seed = 0, and this one has 1"),
        ({"offset": True}, "offset = false"),
    ],
)
def test_other_options_are_refused_by_name(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], message: str
) -> None:
    out = tmp_path / "out"
    stopped(monkeypatch, 1, str(model), out, **QUICK)
    before = {path: path.stat().st_size for path in partial(out).rglob("*")}
    with pytest.raises(ResumeError, match=message) as refusal:
        shiftadd_cli.quantize(str(model), out, **QUICK | fields)
    assert "`resume=False`" in str(refusal.value)
    assert {path: path.stat().st_size for path in partial(out).rglob("*")} == before


def test_run_without_resume_starts_over(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    stopped(monkeypatch, 1, str(model), out, **QUICK)
    report = shiftadd_cli.quantize(str(model), out, resume=False, **QUICK | {"bits": 2})
    assert {layer.bits for layer in report.layers} == {2}
    assert len({layer.block for layer in report.layers}) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_device_may_resume(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(monkeypatch, 1, str(model), tmp_path / "out", **QUICK)
    assert shiftadd_cli.quantize(str(model), tmp_path / "out", device="cpu", **QUICK).recipe["device"] == "cpu"


def test_changed_model_text_or_code_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, text, out = tmp_path / "model", tmp_path / "text.txt", tmp_path / "out"
    shutil.copytree(model, source)
    counting_text(text)
    fields = QUICK | {"calibration": str(text)}
    stopped(monkeypatch, 1, str(source), out, **fields)
    save_tiny("llama", source, seed=1)
    with pytest.raises(ResumeError, match="another model"):
        shiftadd_cli.quantize(str(source), out, **fields)
    text.write_text(text.read_text().replace("number", "cipher"))
    shutil.copytree(model, source, dirs_exist_ok=True)
    with pytest.raises(ResumeError, match="calibration text"):
        shiftadd_cli.quantize(str(source), out, **fields)
    text.write_text(text.read_text().replace("cipher", "number"))
    for name, other, message in (
        ("versions", {"torch": "0.1"}, "another version of"),
        ("code_fingerprint", "0", "shiftadd's own code"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(history, name, lambda other=other: other)
            with pytest.raises(ResumeError, match=message):
                shiftadd_cli.quantize(str(source), out, **fields)
    shiftadd_cli.quantize(str(source), out, **fields)


@pytest.mark.parametrize("when", [0, 2**33])
def test_file_times_do_not_matter(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: int) -> None:
    out = tmp_path / "out"
    stopped(monkeypatch, 1, str(model), out, **QUICK)
    for path in partial(out).rglob("*"):
        os.utime(path, (when, when))
    blocks_done: list[int] = []
    monkeypatch.setattr(history.History, "states", _recording(history.History.states, blocks_done))
    shiftadd_cli.quantize(str(model), out, **QUICK)
    assert blocks_done == [1]


def _recording(states: Callable[..., object], blocks_done: list[int]) -> Callable[..., object]:
    """`History.states`, which also records how many blocks were done."""

    def recorded(self: history.History, *arguments: int) -> object:
        blocks_done.append(self.done)
        return states(self, *arguments)

    return recorded


def test_chosen_bits_are_not_chosen_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHIFTADD_CACHE", str(tmp_path / "cache"))
    fields = QUICK | {"avg_bits": 4.5}
    shiftadd_cli.quantize(str(model), tmp_path / "whole", **fields)
    stopped(monkeypatch, 0, str(model), tmp_path / "out", **fields)
    monkeypatch.setattr(job.AllocationJob, "run", lambda *_: pytest.fail("bits are chosen again"))
    shiftadd_cli.quantize(str(model), tmp_path / "out", **fields)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 16
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "offset"),
    [
        ("journal/start.json", 120),
        ("journal/block-00000.json", -60),
        ("states/quantized-00001.safetensors", -5),
        ("states/quantized-00001.safetensors", 3),
        ("states/token_weights.safetensors", -5),
        ("artifact/model.safetensors", 20),
    ],
)
def test_flipped_bit_is_detected_and_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, offset: int
) -> None:
    out = tmp_path / "out"
    fields = QUICK | {"loss_aware": 1.0}
    stopped(monkeypatch, 1, str(model), out, **fields)
    flip(partial(out) / file, offset)
    with pytest.raises(ResumeError, match="is damaged") as failure:
        shiftadd_cli.quantize(str(model), out, **fields)
    assert Path(file).name in str(failure.value)
    assert "`resume=False`" in str(failure.value)


def test_flipped_bit_in_a_finished_block_is_detected(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    stopped(monkeypatch, 1, str(model), out, **QUICK)
    record = json.loads((partial(out) / "journal" / "block-00000.json").read_text())["record"]
    weights = partial(out) / "artifact" / "model.safetensors"
    header = json.loads(weights.read_bytes()[8 : 8 + int.from_bytes(weights.read_bytes()[:8], "little")])
    name = next(iter(record["written"]))
    start = 8 + int.from_bytes(weights.read_bytes()[:8], "little") + header[name]["data_offsets"][0]
    flip(weights, start)
    with pytest.raises(ResumeError, match=f"{name} does not match its checksum"):
        shiftadd_cli.quantize(str(model), out, **QUICK)


@pytest.mark.parametrize("missing", ["block-00000.json", "start.json", "run.json"])
def test_missing_step_is_detected(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    out = tmp_path / "out"
    stopped(monkeypatch, 2, str(model), out, **QUICK)
    (partial(out) / "journal" / missing).unlink()
    with pytest.raises(ResumeError, match="`resume=False`"):
        shiftadd_cli.quantize(str(model), out, **QUICK)


def test_second_run_into_the_same_folder_is_refused(model: Path, tmp_path: Path) -> None:
    with (
        Workspace(tmp_path / "out"),
        pytest.raises(OutputError, match="Another run is writing"),
    ):
        shiftadd_cli.quantize(str(model), tmp_path / "out", **QUICK)


def test_run_stopped_while_writing_tuned_tensors_resumes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before the first tensor, and then between two. The tuning itself is not repeated."""
    fields = QUICK | WAYS["distill"]
    report = shiftadd_cli.quantize(str(model), tmp_path / "whole", **fields)
    assert report.distillation is not None
    assert report.distillation.kept
    out, add = tmp_path / "out", ArtifactWriter.add
    stopped(monkeypatch, 2, str(model), out, **fields)
    for allowed in (0, 3):
        with monkeypatch.context() as patch:
            remaining = iter(range(allowed))

            def stopping(
                self: ArtifactWriter, name: str, tensor: torch.Tensor, remaining: Iterator[int] = remaining
            ) -> None:
                if next(remaining, None) is None:
                    raise KeyboardInterrupt
                add(self, name, tensor)

            patch.setattr(ArtifactWriter, "add", stopping)
            with pytest.raises(Interrupted):
                shiftadd_cli.quantize(str(model), out, **fields)
    monkeypatch.setattr(stored_model.StoredModel, "distill", lambda *_: pytest.fail("it was distilled before"))
    shiftadd_cli.quantize(str(model), out, **fields)
    assert contents(out) == contents(tmp_path / "whole")
