"""A benchmark is planned from headers: its candidates, its prompts, and the requests it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch
from tiny_models import VOCAB_SIZE, save_tiny, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from shiftadd_cli.benchmark import run as module
from shiftadd_cli.benchmark.model_speed import Candidate
from shiftadd_cli.data.text import load_text
from shiftadd_cli.errors import RecipeError, SourceError
from shiftadd_cli.runtime import opened as models
from shiftadd_cli.runtime.opened import Opened, open_any


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def half(folder: Path) -> Opened:
    return open_any(str(save_tiny("llama", folder / "half", dtype=torch.bfloat16)))


@pytest.fixture(scope="module")
def single(folder: Path) -> Opened:
    return open_any(str(save_tiny("llama", folder / "single")))


class Headers:
    """Stands in for an opened model: only the properties that its headers give."""

    def __init__(self, positions: int | None, vocab_size: int = VOCAB_SIZE) -> None:
        self.spec, self.positions, self.vocab_size = f"model of {positions}", positions, vocab_size

    def load_tokenizer(self) -> PreTrainedTokenizerFast:
        return tiny_tokenizer()


def candidate(name: str, headers: Headers) -> Candidate:
    return Candidate(name, cast(Opened, headers), "float32")


def candidates_of(*positions: int | None) -> list[Candidate]:
    return [candidate(f"model of {limit}", Headers(limit)) for limit in positions]


def dtypes(candidates: list[Candidate]) -> list[tuple[str, str]]:
    return [(entry.opened.path.name, entry.dtype) for entry in candidates]


def test_the_original_is_measured_in_its_own_dtype_and_in_float32(
    half: Opened, single: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "computes_in", lambda device, dtype: True)
    assert dtypes(module._candidates(single, "auto", half)) == [
        ("single", "float32"),
        ("half", "bfloat16"),
        ("half", "float32"),
    ]
    assert dtypes(module._candidates(half, "float32", single)) == [("half", "float32"), ("single", "float32")]
    assert dtypes(module._candidates(half, "auto", None)) == [("half", "bfloat16")]
    assert dtypes(module._candidates(half, "auto", half)) == [("half", "bfloat16"), ("half", "float32")]
    monkeypatch.setattr(models, "computes_in", lambda device, dtype: False)
    assert dtypes(module._candidates(single, "auto", half)) == [("single", "float32"), ("half", "float32")]
    names = [entry.name for entry in module._candidates(half, "bfloat16", single)]
    assert names == [f"{half.spec} in bfloat16", f"{single.spec} in float32"]


@pytest.mark.parametrize(
    ("positions", "requested", "expected"),
    [
        ((4096,), None, (128, 512)),
        ((512,), None, (128, 512)),
        ((511,), None, (128,)),
        ((100,), None, (36,)),
        ((None,), None, (128, 512)),
        ((4096, 200), None, (128,)),
        ((None,), (9, 3, 9), (3, 9)),
        ((512,), (512, 448), (448, 512)),
    ],
)
def test_prompt_lengths_fit_the_context(
    positions: tuple[int | None, ...], requested: tuple[int, ...] | None, expected: tuple[int, ...]
) -> None:
    assert module._lengths(candidates_of(*positions), requested, 64) == expected


@pytest.mark.parametrize(
    ("positions", "requested", "message"),
    [
        ((512,), (449,), "prompt of 449 tokens and 64 new ones are beyond the context of 512 tokens of model of 512"),
        ((512,), (128, 513), "prompt of 513 tokens is beyond the context"),
        ((4096, 100), (128,), "100 tokens of model of 100"),
        ((64,), None, "prompt of 1 tokens"),
    ],
)
def test_prompt_lengths_beyond_a_context_are_refused(
    positions: tuple[int | None, ...], requested: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        module._lengths(candidates_of(*positions), requested, 64)


@pytest.mark.parametrize(("positions", "expected"), [(512, 64), (64, 32), (None, 64)])
def test_new_tokens_leave_room_for_a_prompt_by_default(positions: int | None, expected: int) -> None:
    task = module._read_and_write(candidates_of(positions), None, None, 1)
    assert task.conditions["new_tokens"] == expected


def test_prompts_repeat_a_real_text_if_it_is_too_short() -> None:
    text = load_text("builtin", split="test").text
    ids = tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]
    assert module._prompt(candidates_of(512), 100).tolist() == ids[:100]
    repeated = module._prompt(candidates_of(512), len(ids) + 5)
    assert repeated[-5:].tolist() == ids[:5]


def test_an_original_with_a_smaller_vocabulary_is_refused() -> None:
    other = candidate("other", Headers(512, vocab_size=10))
    with pytest.raises(RecipeError, match="does not know all tokens of model of 512"):
        module._prompt([*candidates_of(512), other], 100)


def test_bad_input_is_refused_before_a_model_is_loaded(single: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Opened, "load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(SourceError, match="no model"):
        module.benchmark(single.spec, against="/nowhere/at/all")
    with pytest.raises(RecipeError, match="beyond the context"):
        module.benchmark(single.spec, prompt_tokens=[1000])
