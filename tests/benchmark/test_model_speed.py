"""Whole models are timed at the right moments, and compared so that more is better."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmark_clocks import ticking
from tiny_models import save_tiny, tiny_model
from torch import nn

from shiftadd_cli.benchmark.model_speed import Candidate, ModelSpeed, measure_models, time_generation, weight_bytes
from shiftadd_cli.benchmark.timing import Span, Spread, Timed
from shiftadd_cli.evaluation.models import ModelInfo, Opened, open_any


def speed(name: str, seconds: float, *, memory: int = 100, disk: int = 50) -> ModelSpeed:
    def timed(factor: float, amount: int = 1) -> Timed:
        return Timed((Span(seconds * factor, seconds), Span(2 * seconds * factor, seconds)), amount)

    info = ModelInfo(name, False, disk, 10, 8.0, None, "float32", "float32", None, None)
    return ModelSpeed(name, info, timed(1), {8: timed(2, 8)}, timed(3, 30), memory, Spread((5.0, 7.0)))


def test_prefill_ends_with_the_first_token_and_decoding_with_the_last():
    model = tiny_model("llama")
    prompts = torch.arange(20).reshape(2, 10)
    assert time_generation(model, prompts, 7, ticking(cores=2)) == (Span(1.0, 2.0), Span(6.0, 12.0))
    assert time_generation(model, prompts[:1], 1, ticking()) == (Span(1.0, 1.0), Span(0.0, 0.0))


def test_no_token_ends_a_text_early_and_settings_of_the_checkpoint_change_nothing():
    model = tiny_model("llama")
    model.generation_config.eos_token_id = list(range(320))
    model.generation_config.num_beams = 3
    assert time_generation(model, torch.arange(4)[None], 9, ticking())[1].wall == 8.0


def test_tensors_count_once_wherever_they_are_held():
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(10, 10, bias=False)
            self.two = nn.Linear(10, 10, bias=False)
            self.two.weight = self.one.weight
            self.register_buffer("kept", torch.zeros(3, dtype=torch.int8), persistent=False)
            self.repacked = torch.zeros(5, dtype=torch.bfloat16)

    assert weight_bytes(Held()) == 400 + 3 + 10


def test_tied_embeddings_count_once():
    model = tiny_model("qwen2")
    parameters = sum(each.numel() for each in model.parameters())
    buffers = {each.data_ptr(): each.numel() for each in model.buffers()}
    assert weight_bytes(model) == 4 * (parameters + sum(buffers.values()))


def test_gains_are_above_1_where_the_first_is_better():
    fast, slow = speed("fast", 1.0, memory=20, disk=25), speed("slow", 3.0)
    gains = fast.gains_over(slow)
    assert {what: gain.values for what, gain in gains.items()} == {
        "decode": (3.0, 3.0),
        "prefill of 8": (3.0, 3.0),
        "load": (3.0, 3.0),
        "weights in memory": (5.0,),
        "size on disk": (2.0,),
    }
    assert slow.gains_over(fast)["load"].median == pytest.approx(1 / 3)


def test_a_speed_is_json_with_rates_and_times():
    told = speed("m", 2.0).to_dict()
    assert told["decode_tokens_per_second"]["rounds"] == [5.0, 2.5]
    assert told["prefill_tokens_per_second"]["8"]["rounds"] == [2.0, 1.0]
    assert told["load_seconds"]["median"] == 3.0
    assert told["times"]["decode"]["cpu_seconds"]["rounds"] == [2.0, 2.0]
    assert (told["name"], told["file_bytes"], told["resident_bytes"]["max"]) == ("m", 50, 7.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "one")


def test_candidates_take_turns_at_loading_and_generating(folder, monkeypatch):
    loaded: list[str] = []
    load = Opened.load

    def note(self: Opened, dtype: str) -> object:
        loaded.append(dtype)
        return load(self, dtype)

    monkeypatch.setattr(Opened, "load", note)
    opened = open_any(str(folder))
    candidates = [Candidate(dtype, opened, dtype) for dtype in ("float32", "bfloat16")]
    speeds, first = measure_models(
        candidates,
        torch.arange(12),
        lengths=(5, 12),
        new_tokens=4,
        batch=3,
        rounds=2,
        clock=ticking(cores=2),
        show_progress=False,
    )
    assert loaded == ["float32", "bfloat16", "bfloat16", "float32", "float32", "bfloat16"]
    assert [each.name for each in speeds] == ["float32", "bfloat16"]
    assert first.info.dtype == "float32"
    for each in speeds:
        assert each.load.spans == (Span(1.0, 2.0),) * 2
        # Three texts at once: of 5 or 12 tokens, and 3 of the 4 new ones each after the first.
        assert each.decode.rate.values == (3.0, 3.0)
        assert {n: timed.rate.values for n, timed in each.prefill.items()} == {5: (15.0, 15.0), 12: (36.0, 36.0)}
        assert each.decode.cores.median == 2.0
    assert speeds[0].weight_bytes > 1.9 * speeds[1].weight_bytes - 1000
