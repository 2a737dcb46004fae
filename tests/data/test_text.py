"""Texts are loaded or refused with a clear message, and windows of their tokens are disjoint and reproducible."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCAB_SIZE, tiny_tokenizer

from shiftadd_cli.data import text as text_module
from shiftadd_cli.data import text_builtin, text_files, text_hub
from shiftadd_cli.data.text import Split, TextData, check_tokens, load_text, sample_windows, tokenise
from shiftadd_cli.data.windows import cut_windows
from shiftadd_cli.errors import CalibrationError


class CharacterTokenizer:
    """One token per character, so that the expected tokens are known without a tokenizer; `before` precedes a text."""

    def __init__(self, before: tuple[str, ...] = ()) -> None:
        self.before = before

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool = True) -> dict[str, list[int]]:
        characters = [*self.before, *text] if add_special_tokens else text
        return {"input_ids": [ord(character) for character in characters]}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [chr(token) for token in ids]


def data(text: str) -> TextData:
    return TextData("a text", text, "")


def write_parquet(path: Path, **columns: list[object]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_builtin_splits_share_no_paragraph() -> None:
    calibration = load_text("builtin", split="calibration")
    test = load_text("builtin", split="test")
    calibration_paragraphs, test_paragraphs = (
        {" ".join(paragraph.split()) for paragraph in split.text.split("\n\n")} for split in (calibration, test)
    )
    assert not calibration_paragraphs & test_paragraphs
    share = len(test.text) / (len(test.text) + len(calibration.text))
    assert 0.08 < share < 0.105
    assert calibration.fingerprint != test.fingerprint
    assert calibration.name != test.name
    assert len(calibration.text) > 250_000


def test_builtin_contains_all_words_of_the_standard_librarys_topics() -> None:
    from pydoc_data.topics import topics

    text = load_text("builtin", split="calibration").text + load_text("builtin", split="test").text
    words = set(text.split())
    topic_words = {word for topic in topics.values() for word in topic.split() if word.isalpha()}
    assert topic_words <= words


def test_builtin_is_reproducible() -> None:
    first = load_text("builtin", split="test")
    text_builtin._splits.cache_clear()
    assert load_text("builtin", split="test") == first


def test_txt_files_are_read_verbatim(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffüber\n\n  two \n".encode())
    loaded = load_text(str(path), split="test")
    assert (loaded.name, loaded.text) == ("a.txt", "über\n\n  two \n")
    assert loaded.fingerprint == hashlib.sha256("über\n\n  two \n".encode()).hexdigest()
    assert load_text(str(path), split="calibration") == loaded


def test_jsonl_and_parquet_give_the_same_text(tmp_path: Path) -> None:
    rows = ["first row", "second\nrow", "dritte Zeile ß"]
    lines = tmp_path / "a.jsonl"
    lines.write_text("\n".join(json.dumps({"text": row, "n": 1}) for row in rows) + "\n\n", encoding="utf-8")
    table = write_parquet(tmp_path / "a.parquet", n=[1, 2, 3, 4], text=[*rows, None])
    assert load_text(str(lines), split="test").text == "\n\n".join(rows)
    assert load_text(str(table), split="test").text == "\n\n".join(rows)


def test_a_text_beyond_the_limit_is_cut_and_its_name_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "MAX_CHARACTERS", 2 << 20)
    path = tmp_path / "long.txt"
    path.write_text("ab" * (3 << 19), encoding="utf-8")
    loaded = load_text(str(path), split="test")
    assert len(loaded.text) == 2 << 20
    assert loaded.name == "long.txt (first 2 million characters)"
    path.write_text("ab" * (1 << 20), encoding="utf-8")
    assert load_text(str(path), split="test").name == "long.txt"


BAD_FILES: dict[str, tuple[bytes | None, str]] = {
    "missing.txt": (None, "There is no file"),
    "empty.txt": (b"", "holds no text"),
    "blank.txt": (b" \n\n\t", "holds no text"),
    "latin.txt": ("Zürich".encode("latin-1"), "not UTF-8"),
    "notes.md": (b"# hello", "not a .txt, .jsonl or .parquet"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": ', "line 2, is not valid JSON"),
    "field.jsonl": (b'{"content": "a"}', "(found the fields content)"),
    "number.jsonl": (b'{"text": 3}', "no text in a field"),
    "roles.jsonl": (b'{"messages": [{"content": "a"}]}', "nor messages in one named 'messages'"),
    "chat.jsonl": (b'{"messages": [{"role": "user", "content": "a"}]}', "line 1, holds a conversation"),
    "list.jsonl": (b'["text"]', "no text in a field"),
    "surrogate.jsonl": (rb'{"text": "a\ud800b"}', "half a character"),
    "empty.jsonl": (b"\n", "holds no text"),
    "broken.parquet": (b"PAR1 nothing", "not a valid parquet"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_by_name(tmp_path: Path, name: str) -> None:
    content, expected = BAD_FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError) as caught:
        load_text(str(tmp_path / name), split="calibration")
    assert expected in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_parquet_columns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"no column 'text', nor 'messages' \(found body, id\)"):
        load_text(str(write_parquet(tmp_path / "a.parquet", body=["a"], id=[1])), split="test")
    with pytest.raises(CalibrationError, match=r"column 'text'.*int64"):
        load_text(str(write_parquet(tmp_path / "b.parquet", text=[1])), split="test")
    with pytest.raises(CalibrationError, match="is a folder"):
        load_text(str(tmp_path), split="test")


def test_an_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(CalibrationError, match=r"did you mean wikitext2\?.*\.txt, \.jsonl or \.parquet"):
        load_text("wikitext", split="test")


@pytest.mark.parametrize(("spec", "message"), [("self", "text a model writes"), ("builtin:1,a/b.txt:2", "a mixture")])
def test_calibration_specs_are_refused_as_single_texts(spec: str, message: str) -> None:
    with pytest.raises(CalibrationError, match=f"{message}.*; give (another|one) text here"):
        load_text(spec, split="test")


@pytest.mark.parametrize("name", sorted(text_hub.CORPORA))
def test_a_corpus_without_network_fails_fast_and_suggests_a_file(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # The reserved name `.invalid` never resolves, whatever network the tests run in.
    monkeypatch.setattr(text_hub, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    start = time.monotonic()
    with pytest.raises(CalibrationError, match=r"cannot be reached.*pass a \.txt, \.jsonl or \.parquet file"):
        load_text(name, split="test")
    assert time.monotonic() - start < 15
    import datasets

    assert datasets.config.HF_HUB_OFFLINE is False


def test_corpora_use_different_splits_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[tuple[str, dict[str, Any]]] = []

    def load_dataset(path: str, **options: Any) -> list[dict[str, str]]:
        requests.append((path, options))
        return [{"text": "one", "sentence": "eins"}, {"text": "two", "sentence": "zwei"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    splits: tuple[Split, ...] = ("calibration", "test")
    texts = {(name, split): load_text(name, split=split) for name in text_hub.CORPORA for split in splits}
    assert texts["wikitext2", "test"].text == "one\n\ntwo"
    assert texts["ptb", "test"].text == "eins zwei"
    assert [options["split"] for path, options in requests if "wikitext" in path] == ["train", "test"]
    assert [options["split"] for path, options in requests if "c4" in path] == ["train", "validation"]
    for path, options in requests:
        if options["data_files"] is not None:
            assert list(options["data_files"]) == [options["split"]], path


def test_c4_is_read_only_as_far_as_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(path: str, **options: object) -> Iterator[dict[str, str]]:
        while True:
            yield {"text": "x" * 1_000_000}

    monkeypatch.setattr("datasets.load_dataset", endless)
    loaded = load_text("c4", split="calibration")
    assert len(loaded.text) >= 8_000_000
    assert "first" in loaded.name


@given(
    text=st.text(alphabet="ab\n", min_size=1, max_size=400),
    seq_len=st.integers(2, 9),
    samples=st.integers(1, 30),
    seed=st.integers(0, 2**63 - 1),
)
@settings(deadline=None)
def test_windows_are_disjoint_pieces_of_the_text(text: str, seq_len: int, samples: int, seed: int) -> None:
    available = len(text) // seq_len
    if available < samples:
        with pytest.raises(CalibrationError) as caught:
            sample_windows(data(text), CharacterTokenizer(), samples=samples, seq_len=seq_len, seed=seed)
        assert f"need {samples * seq_len} tokens" in str(caught.value)
        assert f"has {len(text)};" in str(caught.value)
        return
    numbered = data("".join(chr(1000 + index) for index in range(len(text))))
    windows = sample_windows(numbered, CharacterTokenizer(), samples=samples, seq_len=seq_len, seed=seed)
    assert windows.shape == (samples, seq_len)
    assert windows.dtype == torch.int64
    assert windows.unique().numel() == samples * seq_len
    steps = windows[:, 1:] - windows[:, :-1]
    assert bool((steps == 1).all())
    assert bool(((windows[:, 0] - 1000) % seq_len == 0).all())


@given(
    count=st.integers(0, 300),
    seq_len=st.integers(3, 9),
    samples=st.integers(1, 30),
    before=st.sampled_from(["^", "<^"]),
)
@settings(deadline=None)
def test_windows_begin_with_the_tokenizers_leading_tokens(count: int, seq_len: int, samples: int, before: str) -> None:
    text = data("".join(chr(1000 + index) for index in range(count)))
    tokenizer, text_length = CharacterTokenizer(tuple(before)), seq_len - len(before)
    if count // text_length < samples:
        message = rf"need {samples * text_length} tokens after {re.escape(before)}, but"
        with pytest.raises(CalibrationError, match=message):
            sample_windows(text, tokenizer, samples=samples, seq_len=seq_len, seed=0)
        return
    windows = sample_windows(text, tokenizer, samples=samples, seq_len=seq_len, seed=0)
    assert windows.shape == (samples, seq_len)
    assert all("".join(map(chr, window[: len(before)])) == before for window in windows.tolist())
    text_tokens = windows[:, len(before) :]
    assert text_tokens.unique().numel() == samples * text_length
    assert int(text_tokens.min()) >= 1000


def test_windows_of_special_tokens_only_are_refused() -> None:
    with pytest.raises(CalibrationError, match=r"2 tokens hold nothing but <\^.*larger `seq_len`"):
        sample_windows(data("text" * 99), CharacterTokenizer(("<", "^")), samples=1, seq_len=2, seed=0)


def test_a_conversation_gets_no_second_special_token(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(before=("<|user|>",))
    chats = [{"messages": [{"role": "user", "content": "ab " * 20}]} for _ in range(8)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, chats)))
    text = load_text(str(path), split="calibration", tokenizer=tokenizer)
    chat_length = len(tokenise(text.text, tokenizer)) // 8
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    # The template begins every conversation with the token that the tokenizer puts before a text.
    windows = sample_windows(text, tokenizer, samples=8, seq_len=chat_length, seed=0)
    assert windows.tolist() == [tokenise(text.text, tokenizer)[:chat_length].tolist()] * 8
    for window in sample_windows(text, tokenizer, samples=5, seq_len=chat_length - 3, seed=0).tolist():
        assert window[0] == user
        assert window[1] != user


def test_tokens_without_a_row_in_the_embedding_are_refused_by_name() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<x>"])
    ids = tokenise("some text <x> and more", tokenizer)
    check_tokens(ids, tokenizer, VOCAB_SIZE + 1, data="a text", model="m")
    with pytest.raises(
        CalibrationError, match=r"a text has the token '<x>' \(id 320\), and the embedding of m has 320"
    ):
        check_tokens(ids, tokenizer, VOCAB_SIZE, data="a text", model="m")
    for length in (3, 100):
        with pytest.raises(CalibrationError, match="'<x>'"):
            check_tokens(cut_windows(ids, length), tokenizer, VOCAB_SIZE, data="a text", model="m")


def test_more_samples_extend_fewer_and_the_seed_matters() -> None:
    text = load_text("builtin", split="test")
    draw = {
        (samples, seed): sample_windows(text, tiny_tokenizer(), samples=samples, seq_len=16, seed=seed)
        for samples, seed in ((8, 0), (4, 0), (8, 1))
    }
    assert torch.equal(draw[8, 0][:4], draw[4, 0])
    assert not torch.equal(draw[8, 0], draw[8, 1])


def test_tokens_decode_to_the_text_and_none_is_special() -> None:
    tokenizer = tiny_tokenizer()
    text = load_text("builtin", split="test").text[:20_000]
    tokens = tokenise(text, tokenizer)
    assert tokenizer.decode(tokens) == text
    assert not set(tokens.tolist()) & set(tokenizer.all_special_ids)


@given(text=st.text(alphabet="ab. \n", max_size=300), size=st.integers(1, 40))
@settings(deadline=None)
def test_pieces_lose_nothing_and_split_at_line_breaks(text: str, size: int) -> None:
    pieces = text_module._pieces(text, size)
    assert "".join(pieces) == text
    for before, after in pairwise(pieces):
        assert before
        assert after.lstrip(" ").startswith("\n") or not re.search(r"\S\n", after[:size])


@pytest.mark.parametrize("line_end", ["word\n", "stop.\n", "space \n", "\n"])
def test_long_texts_in_pieces_give_the_same_tokens(monkeypatch: pytest.MonkeyPatch, line_end: str) -> None:
    text = load_text("builtin", split="test").text.replace("\n", line_end)
    expected = tokenise(text, tiny_tokenizer())
    monkeypatch.setattr(text_module, "PIECE_CHARACTERS", 5000)
    assert torch.equal(tokenise(text, tiny_tokenizer()), expected)


def test_a_text_longer_than_the_models_context_logs_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 8
    logging.getLogger("transformers").propagate = True
    try:
        with caplog.at_level(logging.WARNING, logger="transformers"):
            assert len(tokenise("many words " * 50, tokenizer)) > 8
    finally:
        logging.getLogger("transformers").propagate = False
    assert not caplog.records
