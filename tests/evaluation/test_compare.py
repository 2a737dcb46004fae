"""`evaluate` scores models on a text, and refuses models and texts that do not fit together."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny, tiny_model, tiny_tokenizer

from shiftadd_cli.data.text import load_text
from shiftadd_cli.errors import CalibrationError, RecipeError, SourceError
from shiftadd_cli.evaluation.compare import Evaluation, evaluate
from shiftadd_cli.evaluation.perplexity import Score
from shiftadd_cli.evaluation.result import ModelResult
from shiftadd_cli.runtime.opened import Loaded, ModelInfo, Opened


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def one(folder: Path) -> str:
    return str(save_tiny("llama", folder / "one"))


@pytest.fixture(scope="module")
def two(folder: Path) -> str:
    return str(save_tiny("llama", folder / "two", seed=1))


def run(*models: str, **options: Any) -> Evaluation:
    arguments: dict[str, Any] = {"context": 64, "max_tokens": 300, "show_progress": False, **options}
    result = evaluate(models, **arguments)
    assert isinstance(result, Evaluation)
    return result


def test_perplexity_is_over_the_first_tokens_of_the_text(one: str) -> None:
    result = run(one)
    text = load_text("builtin", split="test")
    ids = tiny_tokenizer()(text.text, add_special_tokens=False)["input_ids"]
    assert (result.text, result.text_fingerprint) == (text.name, text.fingerprint)
    assert (result.text_tokens, result.tokens, result.windows, result.context) == (len(ids), 300, 5, 64)
    assert result.scored_tokens == 300 - 5
    model, total = tiny_model("llama"), 0.0
    with torch.no_grad():
        for window in torch.tensor(ids[:300]).split(64):
            chances = model(input_ids=window.unsqueeze(0)).logits[0, :-1].double().log_softmax(-1)
            total -= chances[torch.arange(len(window) - 1), window[1:]].sum().item()
    assert result.models[0].score.perplexity == pytest.approx(math.exp(total / 295), rel=1e-5)
    assert result.original is None
    assert result.models[0].score.kl is None


@torch.no_grad()
def test_windows_begin_with_the_tokenizers_leading_tokens(folder: Path) -> None:
    result = run(str(save_tiny("llama", folder / "begun", before=("<|user|>",))))
    tokenizer = tiny_tokenizer(before=("<|user|>",))
    ids = tokenizer(load_text("builtin", split="test").text, add_special_tokens=False)["input_ids"][:300]
    assert (result.window_start, result.windows, result.tokens, result.scored_tokens) == ("<|user|>", 5, 300, 300)
    model, total = tiny_model("llama"), 0.0
    for text_tokens in torch.tensor(ids).split(63):
        window = torch.tensor(tokenizer(tokenizer.decode(text_tokens))["input_ids"])
        assert window[1:].tolist() == text_tokens.tolist()
        total += (len(window) - 1) * model(input_ids=window.unsqueeze(0), labels=window.unsqueeze(0)).loss.item()
    assert result.models[0].score.perplexity == pytest.approx(math.exp(total / 300), rel=1e-5)


def test_tokens_beyond_the_embedding_are_refused_before_a_model_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny("llama", folder / "beyond")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<x>"])
    tokenizer.save_pretrained(model)
    (tmp_path / "x.txt").write_text("a line with <x> in it\n" * 20)
    monkeypatch.setattr("shiftadd_cli.runtime.opened.Opened.load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(CalibrationError, match=r"x\.txt has the token '<x>' \(id 320\), and the embedding of .* 320 "):
        run(str(model), dataset=str(tmp_path / "x.txt"))


def test_several_models_are_compared_with_an_original(one: str, two: str) -> None:
    result = run(one, two, against=one)
    same, other = (model.score for model in result.models)
    assert (same.kl, same.agreement) == (0.0, 1.0)
    assert other.kl is not None
    assert other.kl > 0.01
    assert result.original is not None
    assert result.original.score.perplexity == same.perplexity
    assert [model.info.spec for model in result.models] == [one, two]


def test_the_result_is_json(one: str, two: str) -> None:
    result = run(two, against=one)
    table = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert table["models"][0]["perplexity"] == result.models[0].score.perplexity
    assert table["models"][0]["file_bytes"] == result.models[0].info.file_bytes
    assert table["original"]["kl"] is None
    assert table["scored_tokens"] == result.scored_tokens
    assert run(one).to_dict()["original"] is None


def test_an_infinite_perplexity_is_null_in_json() -> None:
    info = ModelInfo("m", False, 1, 1, 8.0, None, "float32", "float32", None, None)
    score = Score(800.0, None, math.inf, None, None, None, None, 1.0)
    table = ModelResult(info, score, False).to_dict()
    assert table["perplexity"] is None
    assert table["nll"] == 800.0


def test_calibration_on_the_test_text_is_detected(one: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = load_text("builtin", split="test")
    load = Opened.load
    fingerprint = text.fingerprint

    def with_calibration(self: Opened, *arguments: Any) -> Loaded:
        from dataclasses import replace

        loaded = load(self, *arguments)
        return loaded._replace(info=replace(loaded.info, calibration_fingerprint=fingerprint))

    monkeypatch.setattr("shiftadd_cli.runtime.opened.Opened.load", with_calibration)
    assert run(one).models[0].calibrated_on_test
    fingerprint = load_text("builtin", split="calibration").fingerprint
    assert not run(one).models[0].calibrated_on_test


def test_bad_input_is_refused_before_a_model_is_loaded(
    one: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shiftadd_cli.runtime.opened.Opened.load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(CalibrationError, match="no text called"):
        run(one, dataset="nothing")
    with pytest.raises(SourceError, match="no model"):
        run(one, "/nowhere/at/all")
    (tmp_path / "short.txt").write_text("e")
    with pytest.raises(CalibrationError, match="has 1 tokens, and 2 are needed"):
        run(one, dataset=str(tmp_path / "short.txt"))


def test_models_that_split_text_differently_are_refused(one: str, folder: Path) -> None:
    other = save_tiny("llama", folder / "other")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[]))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(other)
    with pytest.raises(RecipeError, match="different tokens"):
        run(one, str(other))
