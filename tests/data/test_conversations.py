"""Conversations are rendered by the model's own chat template, and refused by file and line where it rejects them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_models import tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from shiftadd_cli.data.text import load_text, tokenise
from shiftadd_cli.errors import CalibrationError

CHATS = [
    [{"role": "user", "content": "What is a slice?"}, {"role": "assistant", "content": "A part of a sequence."}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Über\n?"}],
]


def write_lines(path: Path, *records: object) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return str(path)


def rendered(tokenizer: PreTrainedTokenizerFast, chats: list[Any]) -> str:
    """The conversations in the tokenizer's chat template, one after another."""
    return "".join(str(tokenizer.apply_chat_template(chat, tokenize=False)) for chat in chats)


def test_jsonl_and_parquet_files_are_rendered_by_the_template(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    expected = rendered(tokenizer, CHATS)
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


def test_one_file_may_contain_text_and_conversations(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    spec = write_lines(
        tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"}, {"messages": CHATS[0]}, {"text": "three"}
    )
    chat = rendered(tokenizer, [CHATS[0]])
    assert load_text(spec, split="test", tokenizer=tokenizer).text == f"one\n\ntwo{chat}three"


def test_conversations_that_the_template_rejects_are_refused_by_line(tmp_path: Path) -> None:
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


PARTS = [
    [
        {"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": "a slice?"}]},
        {"role": "assistant", "content": "A part of a sequence."},
    ],
    [{"role": "user", "content": ["one", {"text": "two"}]}, {"role": "assistant", "content": None}],
]
JOINED = [
    [{"role": "user", "content": "What is\na slice?"}, {"role": "assistant", "content": "A part of a sequence."}],
    [{"role": "user", "content": "one\ntwo"}, {"role": "assistant", "content": None}],
]
STRINGS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
ITERATES = (
    "{% for m in messages %}<{{ m.role }}>{% for part in m.content or [] %}{% if part.type == 'text' %}"
    "[{{ part.text }}]{% endif %}{% endfor %}{% endfor %}"
)
BOTH = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content or [] %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [STRINGS, BOTH, "{{ messages | tojson }}"])
def test_parts_are_joined_for_templates_that_take_strings(tmp_path: Path, template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    expected = rendered(tokenizer, JOINED)
    spec = write_lines(tmp_path / "a.jsonl", *({"messages": chat} for chat in PARTS))
    text = load_text(spec, split="calibration", tokenizer=tokenizer).text
    assert text == expected
    assert "type" not in text


def test_a_template_that_drops_strings_gets_parts(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = ITERATES
    spec = write_lines(tmp_path / "a.jsonl", *({"messages": chat} for chat in PARTS))
    assert load_text(spec, split="calibration", tokenizer=tokenizer).text == (
        "<user>[What is][a slice?]<assistant>[A part of a sequence.]<user>[one][two]<assistant>"
    )


def test_parts_in_parquet_files_are_joined_too(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    chats = [[{"role": "user", "content": [{"type": "text", "text": "a", "image": None}]}]]
    column_type = pa.list_(
        pa.struct(
            {
                "role": pa.string(),
                "content": pa.list_(pa.struct({"type": pa.string(), "text": pa.string(), "image": pa.string()})),
            }
        )
    )
    table = tmp_path / "a.parquet"
    pq.write_table(pa.table({"messages": pa.array(chats, column_type)}), table)
    expected = rendered(tokenizer, [[{"role": "user", "content": "a"}]])
    assert load_text(str(table), split="test", tokenizer=tokenizer).text == expected


@pytest.mark.parametrize(
    ("part", "description"),
    [
        ({"type": "image", "image": "a.png"}, "a part of type 'image'"),
        ({"type": "image_url", "image_url": {"url": "a.png"}}, "a part of type 'image_url'"),
        ({"type": "input_audio", "text": None}, "a part of type 'input_audio'"),
        ({"type": "text", "text": 3}, "a part of type 'text'"),
        ({"image": "a.png"}, "a part without a type"),
        (3, "a part without a type"),
    ],
)
def test_parts_other_than_text_are_refused_by_file_and_line(tmp_path: Path, part: object, description: str) -> None:
    chat = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, part]}]
    spec = write_lines(tmp_path / "a.jsonl", {"messages": PARTS[0]}, {"messages": chat})
    with pytest.raises(CalibrationError, match=rf"a\.jsonl, line 2, holds a message with {description}, and only text"):
        load_text(spec, split="calibration", tokenizer=tiny_tokenizer())


def test_content_of_another_type_is_refused(tmp_path: Path) -> None:
    spec = write_lines(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": {"text": "a"}}]})
    with pytest.raises(CalibrationError, match=r"a\.jsonl, line 1, holds a message whose content is neither .* a dict"):
        load_text(spec, split="calibration", tokenizer=tiny_tokenizer())


def test_messages_without_a_role_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"messages": [CHATS[0], [{"role": None, "content": "a"}]]}), path)
    with pytest.raises(CalibrationError, match=r"a\.parquet, row 2, has no messages with a role"):
        load_text(str(path), split="calibration", tokenizer=tiny_tokenizer())
