"""Conversations are what the model's own chat template makes of them, and refused clearly where it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_models import tiny_tokenizer

from shiftadd_cli.calibration.text import load_text, tokenise
from shiftadd_cli.errors import CalibrationError

CHATS = [
    [{"role": "user", "content": "What is a slice?"}, {"role": "assistant", "content": "A part of a sequence."}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Über\n?"}],
]


def write_lines(path: Path, *records: object) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return str(path)


def test_both_kinds_of_files_give_what_the_template_makes(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    expected = "".join(tokenizer.apply_chat_template(chat, tokenize=False) for chat in CHATS)
    assert "slice" in expected
    assert "brief" in expected
    lines = write_lines(tmp_path / "a.jsonl", *({"messages": chat, "id": 1} for chat in CHATS))
    table = tmp_path / "a.parquet"
    pq.write_table(pa.table({"messages": [*CHATS, None]}), table)
    for spec in (lines, str(table)):
        assert load_text(spec, split="test", tokenizer=tokenizer).text == expected
    assert load_text(lines, split="test", tokenizer=tokenizer) == load_text(
        lines, split="calibration", tokenizer=tokenizer
    )


def test_special_tokens_of_the_template_are_tokens(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    data = load_text(
        write_lines(tmp_path / "a.jsonl", {"messages": CHATS[0]}), split="calibration", tokenizer=tokenizer
    )
    assert tokenise(data.text, tokenizer).tolist().count(tokenizer.eos_token_id) == len(CHATS[0])


def test_text_and_conversations_may_stand_in_one_file(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    spec = write_lines(
        tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"}, {"messages": CHATS[0]}, {"text": "three"}
    )
    chat = tokenizer.apply_chat_template(CHATS[0], tokenize=False)
    assert load_text(spec, split="test", tokenizer=tokenizer).text == f"one\n\ntwo{chat}three"


def test_what_a_template_does_not_take_is_named_by_its_line(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{% endfor %}-"
    )
    spec = write_lines(tmp_path / "a.jsonl", {"messages": CHATS[0]}, {"messages": [{"role": "tool", "content": "a"}]})
    with pytest.raises(CalibrationError, match=r"a\.jsonl, line 2, holds a conversation.*no tools.*leave it out"):
        load_text(spec, split="calibration", tokenizer=tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(CalibrationError, match=r"line 1, holds a conversation.*no chat template; write it out"):
        load_text(spec, split="calibration", tokenizer=tokenizer)


def test_a_column_of_other_things_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"messages": [CHATS[0], [{"role": None, "content": "a"}]]}), path)
    with pytest.raises(CalibrationError, match=r"a\.parquet, row 2, has no messages with a role"):
        load_text(str(path), split="calibration", tokenizer=tiny_tokenizer())
