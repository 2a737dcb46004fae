"""Full models are timed at the right moments; in comparisons, more is better."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_clocks import ticking
from tiny_models import save_tiny, tiny_model
from torch import nn

from shiftadd_cli.benchmark.model_speed import Candidate, ModelSpeed, measure_models, weight_bytes
from shiftadd_cli.benchmark.timing import Clock, Span, Spread, Timed
from shiftadd_cli.benchmark.work import Work
from shiftadd_cli.runtime.opened import Loaded, ModelInfo, Opened, open_any


def speed(name: str, seconds: float, *, memory: int = 100, disk: int = 50) -> ModelSpeed:
    def timed(factor: float, amount: int = 1) -> Timed:
        return Timed((Span(seconds * factor, seconds), Span(2 * seconds * factor, seconds)), amount)

    info = ModelInfo(name, False, disk, 10, 8.0, None, "float32", "float32", None, None)
    work = {"prefill of 8": timed(2, 8), "decode": timed(3, 30)}
    return ModelSpeed(name, info, timed(1), "tokens", work, memory, Spread((5.0, 7.0)))


def test_each_tensor_of_a_model_counts_once() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(10, 10, bias=False)
            self.two = nn.Linear(10, 10, bias=False)
            self.two.weight = self.one.weight
            self.register_buffer("buffer", torch.zeros(3, dtype=torch.int8), persistent=False)
            self.repacked = torch.zeros(5, dtype=torch.bfloat16)

    assert weight_bytes(Model()) == 400 + 3 + 10


def test_tied_embeddings_count_once() -> None:
    model = tiny_model("qwen2")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    buffers = {buffer.data_ptr(): buffer.numel() for buffer in model.buffers()}
    assert weight_bytes(model) == 4 * (parameters + sum(buffers.values()))


def test_gains_are_above_1_if_the_first_is_better() -> None:
    fast, slow = speed("fast", 1.0, memory=20, disk=25), speed("slow", 3.0)
    gains = fast.gains_over(slow)
    assert {name: gain.values for name, gain in gains.items()} == {
        "prefill of 8": (3.0, 3.0),
        "decode": (3.0, 3.0),
        "load": (3.0, 3.0),
        "weights in memory": (5.0,),
        "size on disk": (2.0,),
    }
    assert slow.gains_over(fast)["load"].median == pytest.approx(1 / 3)


def test_a_speed_is_json_with_rates_and_times() -> None:
    table = speed("m", 2.0).to_dict()
    assert table["tokens_per_second"]["decode"]["rounds"] == [5.0, 2.5]
    assert table["tokens_per_second"]["prefill of 8"]["rounds"] == [2.0, 1.0]
    assert table["load_seconds"]["median"] == 3.0
    assert table["times"]["decode"]["cpu_seconds"]["rounds"] == [2.0, 2.0]
    assert (table["name"], table["file_bytes"], table["resident_bytes"]["max"]) == ("m", 50, 7.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "one")


def test_candidates_take_turns_at_loading_and_working(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded_dtypes: list[str] = []
    load = Opened.load

    def record(self: Opened, dtype: str) -> Loaded:
        loaded_dtypes.append(dtype)
        return load(self, dtype)

    monkeypatch.setattr(Opened, "load", record)
    opened = open_any(str(folder))
    candidates = [Candidate(dtype, opened, dtype) for dtype in ("float32", "bfloat16")]
    run_dtypes: list[torch.dtype] = []
    touched_dtypes: list[torch.dtype] = []

    def run(model: Any, clock: Clock) -> list[Span]:
        run_dtypes.append(model.dtype)
        start = clock.now()
        return [clock.now() - start, clock.now() - start]

    speeds, first = measure_models(
        candidates,
        [Work(run, (("one", 6), ("two", 10))), Work(run, (("three", 1),))],
        "things",
        lambda model: touched_dtypes.append(model.dtype),
        rounds=2,
        clock=ticking(cores=2),
        show_progress=False,
    )
    assert loaded_dtypes == ["float32", "bfloat16", "bfloat16", "float32", "float32", "bfloat16"]
    assert [str(dtype).removeprefix("torch.") for dtype in touched_dtypes] == loaded_dtypes
    assert len(run_dtypes) == 2 * 2 * 3
    assert [measured.name for measured in speeds] == ["float32", "bfloat16"]
    assert first.info.dtype == "float32"
    for measured in speeds:
        assert measured.load.spans == (Span(1.0, 2.0),) * 2
        assert {part: timed.rate.values for part, timed in measured.work.items()} == {
            "one": (6.0, 6.0),
            "two": (5.0, 5.0),
            "three": (1.0, 1.0),
        }
        assert measured.work["one"].cores.median == 2.0
    assert speeds[0].weight_bytes > 1.9 * speeds[1].weight_bytes - 1000
