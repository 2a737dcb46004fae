"""A benchmark is planned from headers: what is measured, on which prompts, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import VOCAB_SIZE, save_tiny, tiny_tokenizer

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


class Fake:
    """What is known of a model from its headers."""

    def __init__(self, positions: int | None, vocab_size: int = VOCAB_SIZE) -> None:
        self.spec, self.positions, self.vocab_size = f"model of {positions}", positions, vocab_size

    def load_tokenizer(self):
        return tiny_tokenizer()


def fakes(*positions: int | None) -> list[Candidate]:
    return [Candidate(f"model of {each}", Fake(each), "float32") for each in positions]


def dtypes(candidates: list[Candidate]) -> list[tuple[str, str]]:
    return [(each.opened.path.name, each.dtype) for each in candidates]


def test_the_original_is_measured_as_it_is_and_in_float32(half, single, monkeypatch):
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
    names = [each.name for each in module._candidates(half, "bfloat16", single)]
    assert names == [f"{half.spec} in bfloat16", f"{single.spec} in float32"]


@pytest.mark.parametrize(
    ("positions", "asked", "expected"),
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
def test_lengths_are_those_that_fit(positions, asked, expected):
    assert module._lengths(fakes(*positions), asked, 64) == expected


@pytest.mark.parametrize(
    ("positions", "asked", "said"),
    [
        ((512,), (449,), "prompt of 449 tokens and 64 new ones are beyond the context of 512 tokens of model of 512"),
        ((512,), (128, 513), "prompt of 513 tokens is beyond the context"),
        ((4096, 100), (128,), "100 tokens of model of 100"),
        ((64,), None, "prompt of 1 tokens"),
    ],
)
def test_lengths_beyond_a_context_are_refused(positions, asked, said):
    with pytest.raises(RecipeError, match=said):
        module._lengths(fakes(*positions), asked, 64)


@pytest.mark.parametrize(("positions", "expected"), [(512, 64), (64, 32), (None, 64)])
def test_new_tokens_that_nobody_asked_for_leave_room_for_a_prompt(positions, expected):
    task = module._read_and_write(fakes(positions), None, None, 1)
    assert task.conditions["new_tokens"] == expected


def test_prompts_are_real_text_and_repeat_where_it_is_short():
    text = load_text("builtin", split="test").text
    ids = tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]
    assert module._prompt(fakes(512), 100).tolist() == ids[:100]
    long = module._prompt(fakes(512), len(ids) + 5)
    assert long[-5:].tolist() == ids[:5]


def test_an_original_of_other_tokens_is_refused():
    other = Candidate("other", Fake(512, vocab_size=10), "float32")
    with pytest.raises(RecipeError, match="does not know all tokens of model of 512"):
        module._prompt([*fakes(512), other], 100)


def test_bad_input_is_refused_before_a_model_is_loaded(single, monkeypatch):
    monkeypatch.setattr(Opened, "load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(SourceError, match="no model"):
        module.benchmark(single.spec, against="/nowhere/at/all")
    with pytest.raises(RecipeError, match="beyond the context"):
        module.benchmark(single.spec, prompt_tokens=[1000])
