"""Calibration data of a plan: every text has its share, and the plan says whether the model writes its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny, tiny_model, tiny_tokenizer
from torch import Tensor

from shiftadd_cli.api import evaluate, quantize
from shiftadd_cli.cli.describe import describe_plan
from shiftadd_cli.data.text import load_text, sample_windows
from shiftadd_cli.distributed.team import Team, Tensors
from shiftadd_cli.errors import CalibrationError, RecipeError
from shiftadd_cli.pipeline.calibration import Calibration, CalibrationSet, draw_calibration
from shiftadd_cli.pipeline.plan import Plan, make_plan
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.source import Source, open_source

SIZES: dict[str, Any] = {"samples": 8, "seq_len": 32, "batch_size": 3, "group_size": 16, "writing_length": 16}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHIFTADD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return open_source(str(save_tiny("llama", tmp_path / "model")))


def planned(source: Source, calibration: str, memory: int | None = None, **fields: Any) -> Plan:
    recipe = Recipe.load("equal-bits", {**SIZES, "calibration": calibration, **fields})
    return make_plan(source, recipe, memory=memory)


def drawn(plan: Plan) -> CalibrationSet:
    calibration = draw_calibration(plan)
    assert calibration is not None
    return calibration


def rows(windows: Tensor) -> set[tuple[int, ...]]:
    return {tuple(window) for window in windows.tolist()}


def test_single_text_gives_the_windows_sampled_from_it(source: Source) -> None:
    data = drawn(planned(source, "builtin"))
    text = load_text("builtin", split="calibration")
    expected = sample_windows(text, source.load_tokenizer(), samples=8, seq_len=32, seed=0)
    assert torch.equal(data.samples, expected)
    assert (data.name, data.fingerprint, data.parts) == (text.name, text.fingerprint, ())


def test_every_part_of_a_mixture_gets_its_share_of_windows(source: Source, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("".join(f"note {number} on something else\n" for number in range(500)))
    plan = planned(source, f"self:0.5,builtin:0.25,{notes}:0.25")
    data = drawn(plan)
    assert [part.samples for part in data.parts] == [4, 2, 2]
    assert [part.share for part in data.parts] == [0.5, 0.25, 0.25]
    builtin, own = (drawn(planned(source, spec, samples=2)) for spec in ("builtin", str(notes)))
    written = drawn(planned(source, "self", samples=4))
    assert rows(data.samples) == rows(torch.cat([builtin.samples, own.samples, written.samples]))
    assert len(rows(data.samples)) == 8
    # The parts are shuffled, not concatenated.
    assert not torch.equal(data.samples[:4], written.samples)
    assert "notes.txt" in data.name
    assert torch.equal(drawn(plan).samples, data.samples)
    other = drawn(planned(source, f"self:0.5,builtin:0.25,{notes}:0.25", seed=1))
    assert not torch.equal(other.samples, data.samples)


def test_report_card_and_evaluation_know_the_parts(source: Source, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("".join(f"note {number} on something else\n" for number in range(500)))
    report = quantize(source.spec, tmp_path / "out", "equal-bits", calibration=f"self:1,{notes}:1", **SIZES)
    assert report.calibration is not None
    assert [part.name.partition(" ")[0] for part in report.calibration.parts] == ["self", "notes.txt"]
    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    assert stored["calibration"]["parts"][1]["fingerprint"] == load_text(str(notes), split="test").fingerprint
    card = (tmp_path / "out" / "README.md").read_text()
    assert "0.5 self (documents and conversations that the model wrote" in card
    assert "0.5 notes.txt" in card
    on_notes, on_builtin = (
        evaluate([str(tmp_path / "out")], dataset=dataset, max_tokens=64, context=32, show_progress=False)
        for dataset in (str(notes), "builtin")
    )
    assert on_notes.models[0].calibrated_on_test
    assert not on_builtin.models[0].calibrated_on_test


def test_model_writes_its_text_on_demand_and_once(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[object] = []
    load_model = Source.load_model

    def count(self: Source, dtype: torch.dtype | None = None) -> Any:
        loads.append(self)
        return load_model(self, dtype)

    monkeypatch.setattr(Source, "load_model", count)
    calibration = Calibration.of(planned(source, "self"))
    assert calibration is not None
    assert not loads
    first = calibration.draw()
    assert calibration.draw() is first
    assert len(loads) == 1


class _Follower(Team):
    """A process other than the first, which receives these tensors."""

    rank, size = 1, 2

    def __init__(self, received: Tensors) -> None:
        self._received = received

    def share_tensors(self, tensors: Tensors | None) -> Tensors:
        return self._received


def test_other_processes_receive_the_text_of_the_first(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    class First(Team):
        def share_tensors(self, tensors: Tensors | None) -> Tensors:
            sent.update(tensors or {})
            return super().share_tensors(tensors)

    sent: Tensors = {}
    first, other = (Calibration.of(planned(source, "self:1,builtin:1")) for _ in range(2))
    assert first is not None
    assert other is not None
    expected = first.draw(First())
    monkeypatch.setattr(Source, "load_model", lambda *_: pytest.fail("a model was loaded"))
    assert torch.equal(other.draw(_Follower(sent)).samples, expected.samples)
    third = Calibration.of(planned(source, "self-chat"))
    assert third is not None
    with pytest.raises(RecipeError, match="The first process of the team has another calibration"):
        third.draw(_Follower(sent))


def test_model_too_large_to_load_uses_the_builtin_text_and_says_so(source: Source) -> None:
    plan = planned(source, "self", memory=1000)
    assert plan.recipe.calibration == "builtin"
    description = " ".join(describe_plan(plan).split())
    assert "does not write its own calibration text: the whole model would be in memory" in description
    assert "Calibration builtin, 8 x 32 tokens" in description
    assert drawn(plan).name.startswith("builtin")
    assert planned(source, "self:3,builtin:1", memory=1000).recipe.calibration == "builtin"


def test_plan_warns_only_about_the_builtin_text(source: Source) -> None:
    for calibration in ("builtin", "self:0.5,builtin:0.5"):
        assert "the builtin text is the documentation of Python" in describe_plan(planned(source, calibration))
    for calibration in ("self", "self-plain"):
        description = describe_plan(planned(source, calibration))
        assert "Warning" not in description
        assert f"Calibration   {calibration}, 8 x 32 tokens" in description


def test_planned_memory_includes_writing(source: Source) -> None:
    # So many windows are written at once that nothing else needs as much.
    few, many = (
        planned(source, "self", samples=samples, writing_length=256, seq_len=256).peak_memory_bytes
        for samples in (8, 4000)
    )
    plain = planned(source, "builtin", samples=4000, seq_len=256).peak_memory_bytes
    assert many > few
    assert many > plain


def test_conversations_without_a_chat_template_are_refused_early(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "model")
    source = open_source(str(tmp_path / "model"))
    with pytest.raises(CalibrationError, match="cannot write conversations"):
        Calibration.of(planned(source, "self-chat"))
    assert drawn(planned(source, "self")).name.startswith("self (documents that the model wrote")


@pytest.mark.parametrize("spec", ["self:1,none:1", "self:1,nothing:1", "self:1,/no/such.txt:1"])
def test_invalid_part_is_refused_before_the_model_writes(
    source: Source, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Source, "load_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(CalibrationError, match=r"no text called|no file"):
        draw_calibration(planned(source, spec))
