"""The model's own text has the requested kinds and no loops, and is reproducible and cached."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import VOCAB_SIZE, save_tiny, tiny_model, tiny_tokenizer
from torch import Tensor

from shiftadd_cli.data.mixture import KINDS
from shiftadd_cli.errors import CalibrationError, NumericalError
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.self_text.authors import ChatForm, Vocabulary
from shiftadd_cli.self_text.repetition import is_degenerate
from shiftadd_cli.self_text.write import (
    Request,
    WritingTokens,
    row_bytes,
    why_not,
    without_self,
    write_windows,
    writing_bytes,
    written_by_model,
)
from shiftadd_cli.source import Source, open_source

REQUEST = Request(KINDS["self"], samples=6, seq_len=40, piece=16, temperature=1.0, min_p=0.0, seed=0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHIFTADD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return open_source(str(save_tiny("llama", tmp_path / "model")))


def written(source: Source, request: Request) -> Tensor:
    return write_windows(source, WritingTokens.of(source), request, torch.device("cpu"))


def clear(cache: Path) -> None:
    for file in cache.rglob("*.safetensors"):
        file.unlink()


def test_windows_have_the_requested_size_and_tokens_of_the_model(source: Source) -> None:
    windows = written(source, REQUEST)
    assert windows.shape == (6, 40)
    assert windows.dtype == torch.int64
    assert int(windows.min()) >= 0
    assert int(windows.max()) < VOCAB_SIZE
    assert not any(is_degenerate(window) for window in windows)


def test_equal_requests_give_equal_windows_and_other_seeds_do_not(source: Source, cache: Path) -> None:
    first = written(source, REQUEST)
    clear(cache)
    assert torch.equal(written(source, REQUEST), first)
    assert not torch.equal(written(source, replace(REQUEST, seed=1)), first)


def test_written_windows_are_cached(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    first = written(source, REQUEST)

    def refuse(self: Source, dtype: torch.dtype | None = None) -> None:
        raise AssertionError("the model is loaded again")

    monkeypatch.setattr(Source, "load_model", refuse)
    assert torch.equal(written(source, REQUEST), first)
    with pytest.raises(AssertionError, match="loaded again"):
        written(source, replace(REQUEST, temperature=1.1))


@pytest.mark.parametrize("damage", [b"", b"no tensors", None])
def test_damaged_windows_are_written_again(source: Source, cache: Path, damage: bytes | None) -> None:
    first = written(source, REQUEST)
    (file,) = cache.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-8] if damage is None else damage)
    assert torch.equal(written(source, REQUEST), first)


def test_another_model_or_template_has_a_text_of_its_own(tmp_path: Path, cache: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    written(open_source(str(folder)), REQUEST)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }}<|endoftext|>{% endfor %}"
    tokenizer.save_pretrained(folder)
    written(open_source(str(folder)), REQUEST)
    written(open_source(str(save_tiny("llama", tmp_path / "other", seed=1))), REQUEST)
    assert len(list(cache.rglob("*.safetensors"))) == 3


def test_documents_and_conversations_take_turns(source: Source) -> None:
    tokenizer = source.load_tokenizer()
    form = ChatForm.of(tokenizer, Vocabulary.of(tokenizer, VOCAB_SIZE))
    assert form is not None
    opening = list(form.opening)
    windows = written(source, REQUEST).tolist()
    piece = REQUEST.piece_length
    for number, window in enumerate(windows):
        starts = [window[start : start + len(opening)] == opening for start in range(0, REQUEST.seq_len, piece)]
        assert starts == [number % 2 == 1] * REQUEST.pieces
    assert all(
        window[: len(opening)] == opening
        for window in written(source, replace(REQUEST, kinds=KINDS["self-chat"])).tolist()
    )


def test_a_model_without_a_chat_template_writes_documents(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tokenizer = tiny_tokenizer(before=("<|endoftext|>",))
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "model")
    plain = open_source(str(tmp_path / "model"))
    windows = written(plain, REQUEST)
    assert (windows[:, :: REQUEST.piece_length] == 0).all()
    with pytest.raises(CalibrationError, match=r"no chat template that shows .* give `calibration=self-plain`, or a"):
        written(plain, replace(REQUEST, kinds=KINDS["self-chat"]))


def test_conversations_need_room_after_the_opening(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "Be helpful and never say anything that is not true. " + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "model")
    wordy = open_source(str(tmp_path / "model"))
    writing = WritingTokens.of(wordy)
    assert writing.form is not None
    opening = len(writing.form.opening)
    chat = replace(REQUEST, kinds=KINDS["self-chat"], seq_len=2 * opening, piece=2 * opening)
    assert writing.kinds(chat, "m") == ("conversations",)
    short = replace(chat, seq_len=2 * opening - 1)
    with pytest.raises(CalibrationError, match=rf"conversation with {opening} tokens.* larger `writing_length`"):
        writing.kinds(short, "m")
    assert writing.kinds(replace(short, kinds=KINDS["self"]), "m") == ("documents",)


def test_a_model_that_can_only_repeat_itself_is_refused(source: Source) -> None:
    with pytest.raises(CalibrationError, match=r"repeats itself in nearly all .* or builtin"):
        # A random model that always takes the likeliest token soon runs in a loop.
        written(source, replace(REQUEST, samples=2, seq_len=400, piece=400, min_p=0.999))


def test_a_model_with_infinite_weights_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.model.norm.weight.data.fill_(torch.inf)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(NumericalError, match="not finite"):
        written(open_source(str(tmp_path / "model")), REQUEST)


def test_memory_decides_whether_the_model_writes(source: Source) -> None:
    needed = writing_bytes(source, REQUEST)
    assert needed >= source.model_bytes + row_bytes(source, REQUEST.piece_length)
    assert why_not(source, REQUEST, needed) is None
    assert "the whole model would be in memory" in (why_not(source, REQUEST, needed - 1) or "")


def test_keys_and_values_are_counted(source: Source) -> None:
    # Two layers, two heads of keys and values, of 12 numbers of 4 bytes each.
    token_bytes = 2 * 2 * 2 * 12 * 4
    assert row_bytes(source, 100) - row_bytes(source, 50) >= 50 * token_bytes


def test_a_recipe_asks_for_windows_by_share() -> None:
    def requests(calibration: str) -> list[tuple[int, int]]:
        recipe = Recipe.load("default", {"calibration": calibration, "samples": 10})
        return [(len(request.kinds), request.samples) for request in written_by_model(recipe)]

    assert requests("self") == [(2, 10)]
    assert requests("self-plain:0.3,builtin:0.5,self-chat:0.2") == [(1, 3), (1, 2)]
    assert requests("builtin") == []
    assert written_by_model(Recipe.load("fast")) == []


def test_builtin_text_replaces_the_models_own() -> None:
    assert without_self("self") == "builtin"
    assert without_self("self-plain:1,self-chat:1") == "builtin"
    assert without_self("self:0.5,builtin:0.25,notes.txt:0.25") == "builtin:0.750000,notes.txt:0.250000"
