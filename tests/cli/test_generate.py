"""`shiftadd generate` as a user types it: only the text on standard output, and the refusal of bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from artifacts import write_checkpoint
from click.testing import CliRunner, Result
from tiny_models import save_tiny, tiny_model, tiny_tokenizer
from tiny_vision import save_tiny_vision

from shiftadd_cli.cli import generate as verb
from shiftadd_cli.cli import main
from shiftadd_cli.runtime.opened import Opened


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny("llama", tmp_path_factory.mktemp("models") / "original"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A compressed model without an end-of-text token and without a chat template."""
    model = tiny_model("llama")
    model.config.eos_token_id = None
    folder = write_checkpoint(model, tmp_path_factory.mktemp("models") / "packed", tables=True).folder
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    return str(folder)


def generate(*arguments: str, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(main, ["generate", *arguments, "--device", "cpu"], input=stdin)


def test_standard_output_holds_only_the_text(packed: str) -> None:
    result = generate(packed, "--prompt", "The for statement", "--max-new-tokens", "8")
    assert result.exit_code == 0, result.output
    document = json.loads(generate(packed, "--prompt", "The for statement", "--max-new-tokens", "8", "--json").stdout)
    assert result.stdout == document["text"].removesuffix("\n") + "\n"
    assert re.fullmatch(
        rf"Prompt {document['prompt_tokens']} tokens at [\d.]+ tokens/s; new 8 tokens at [\d.]+ tokens/s; "
        r"loaded in [\d.]+ s; peak memory [\d.]+ [MG]B\n",
        result.stderr,
    )


def test_same_command_gives_the_same_text(packed: str) -> None:
    arguments = (packed, "--prompt", "A", "--temperature", "1.2", "--top-p", "0.95", "--max-new-tokens", "20")
    texts = [generate(*arguments, "--seed", seed).stdout for seed in ("7", "7", "8")]
    assert texts[0] == texts[1] != texts[2]


def test_json_describes_the_run(original: str) -> None:
    result = generate(original, "--prompt", "hello", "--json", "--max-new-tokens", "3", "--dtype", "bfloat16")
    assert (result.exit_code, result.stderr) == (0, "")
    document = json.loads(result.stdout)
    assert (document["model"], document["dtype"], document["device"], document["chat"]) == (
        original,
        "bfloat16",
        "cpu",
        True,
    )
    assert document["new_tokens"] <= 3
    assert document["peak_memory_bytes"] > 1e7


def test_prompt_can_come_from_standard_input(packed: str) -> None:
    typed = generate(packed, "--prompt", "two\nlines", "--json", "--max-new-tokens", "4")
    for piped in ("two\nlines", "two\nlines\n", "two\nlines\r\n"):
        document = json.loads(generate(packed, "--prompt", "-", "--json", "--max-new-tokens", "4", stdin=piped).stdout)
        assert document["text"] == json.loads(typed.stdout)["text"]
        assert document["prompt_tokens"] == json.loads(typed.stdout)["prompt_tokens"]


def test_chat_template_can_be_switched_off(original: str) -> None:
    arguments = (original, "--prompt", "hello", "--json", "--max-new-tokens", "1")
    default, chat, plain = (
        json.loads(generate(*arguments, *switch).stdout) for switch in ((), ("--chat",), ("--no-chat",))
    )
    assert [document["chat"] for document in (default, chat, plain)] == [True, True, False]
    # The template of the tiny tokenizer puts one token before the message and one after it.
    assert default["prompt_tokens"] == chat["prompt_tokens"] == plain["prompt_tokens"] + 2


def test_text_ends_with_the_context(packed: str) -> None:
    prompt = "if " * 250
    tokens = len(tiny_tokenizer()(prompt)["input_ids"])
    assert 490 < tokens < 512
    result = generate(packed, "--prompt", prompt, "--max-new-tokens", "10000")
    assert result.exit_code == 0, result.output
    assert f"new {512 - tokens} tokens" in result.stderr
    assert "tokens/s, where the context ended;" in result.stderr


def test_interruption_keeps_the_text_and_exits_130(packed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    show, shown = verb._show, []

    def stop_at_the_third(piece: str) -> None:
        show(piece)
        shown.append(piece)
        if len(shown) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(verb, "_show", stop_at_the_third)
    result = generate(packed, "--prompt", "The for statement")
    assert result.exit_code == 130
    assert result.stdout == "".join(shown) != ""
    assert result.stderr == "\nInterrupted.\n"


def test_draft_keeps_the_text_and_says_what_it_did(original: str, packed: str) -> None:
    arguments = ("--prompt", "The for statement", "--max-new-tokens", "40", "--no-chat", "--dtype", "float32")
    plain = json.loads(generate(original, *arguments, "--json").stdout)
    assert (plain["draft"], plain["speculated"], plain["gain"]) == (None, None, None)
    for draft in (packed, original, "lookup"):
        for options in ((), ("--draft-tokens", "3")):
            result = generate(original, *arguments, "--draft", draft, *options, "--json")
            assert result.exit_code == 0, result.output
            document = json.loads(result.stdout)
            assert (document["text"], document["draft"]) == (plain["text"], draft)
            assert document["speculated"]["accepted"] <= document["speculated"]["drafted"]
    shown = generate(original, *arguments, "--draft", original, "--draft-tokens", "3")
    assert re.search(r"tokens/s; drafted \d+ tokens, 100% accepted; loaded in", shown.stderr), shown.stderr
    adapted = generate(original, *arguments, "--draft", original)
    assert re.search(r"tokens/s; drafted .* accepted, \d+\.\d\d x the speed without; loaded in", adapted.stderr)


def test_threads_can_be_chosen(packed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    assert generate(packed, "--prompt", "a", "--max-new-tokens", "1", "--threads", "1").exit_code == 0
    assert chosen == [1]


BAD = {
    "no model": ([], "Missing argument 'OUT'"),
    "no prompt": (["{packed}"], "Missing option '--prompt'"),
    "missing model": (["/nowhere/at/all", "--prompt", "a"], "There is no model at /nowhere/at/all"),
    "a folder that is no model": (["{empty}", "--prompt", "a"], "has no config.json"),
    "a vision model": (["{encoder}", "--prompt", "a"], "is a vision model, which reads no text"),
    "empty prompt": (["{packed}", "--prompt", " "], "The prompt is empty"),
    "no template": (["{packed}", "--prompt", "a", "--chat"], "has no chat template"),
    "prompt too long": (["{packed}", "--prompt", "{long}"], "but the context of {packed} is 512; shorten it"),
    "negative temperature": (["{packed}", "--prompt", "a", "--temperature", "-1"], "--temperature -1 is not valid"),
    "no tokens": (["{packed}", "--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens 0"),
    "no threads": (["{packed}", "--prompt", "a", "--threads", "0"], "'--threads'"),
    "draft tokens without a draft": (["{packed}", "--prompt", "a", "--draft-tokens", "3"], "--draft-tokens changes"),
    "too many draft tokens": (
        ["{packed}", "--prompt", "a", "--draft", "lookup", "--draft-tokens", "8"],
        "--draft-tokens 8 is not valid",
    ),
    "missing draft": (["{packed}", "--prompt", "a", "--draft", "/nowhere/at/all"], "There is no model at"),
    "another vocabulary": (["{packed}", "--prompt", "a", "--draft", "{other}"], "has another vocabulary than"),
    "draft that sees": (["{packed}", "--prompt", "a", "--draft", "{encoder}"], "is a vision model"),
    "unknown dtype": (["{packed}", "--prompt", "a", "--dtype", "int8"], "'--dtype'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_a_model_is_loaded(
    case: str, packed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Opened, "load", lambda *_: pytest.fail("a model was loaded"))
    encoder = save_tiny_vision("vit-bare", tmp_path / "encoder")
    other = save_tiny("llama", tmp_path / "other")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(other)
    names = {"packed": packed, "other": other, "empty": tmp_path, "encoder": encoder, "long": "long " * 600}
    arguments, message = BAD[case]
    result = generate(*(argument.format(**names) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert message.format(**names) in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_prompt_that_is_not_utf8_is_refused(packed: str) -> None:
    result = generate(packed, "--prompt", "-", stdin=b"\xff\xfe\x00")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "not valid UTF-8 text" in result.stderr
