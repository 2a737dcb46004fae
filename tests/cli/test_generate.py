"""`shiftadd generate` as a user types it: the text alone on standard output, and how bad input ends."""

from __future__ import annotations

import json
import re

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
    """No token ends its texts, and it has no chat template."""
    model = tiny_model("llama")
    model.config.eos_token_id = None
    folder = write_checkpoint(model, tmp_path_factory.mktemp("models") / "packed", tables=True).folder
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    return str(folder)


def generate(*arguments: str, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(main, ["generate", *arguments, "--device", "cpu"], input=stdin)


def test_the_text_is_all_there_is_on_standard_output(packed):
    result = generate(packed, "--prompt", "The for statement", "--max-new-tokens", "8")
    assert result.exit_code == 0, result.output
    told = json.loads(generate(packed, "--prompt", "The for statement", "--max-new-tokens", "8", "--json").stdout)
    assert result.stdout == told["text"].removesuffix("\n") + "\n"
    assert re.fullmatch(
        rf"Prompt {told['prompt_tokens']} tokens at [\d.]+ tokens/s; new 8 tokens at [\d.]+ tokens/s; "
        r"loaded in [\d.]+ s; peak memory [\d.]+ [MG]B\n",
        result.stderr,
    )


def test_the_same_command_gives_the_same_text(packed):
    drawn = (packed, "--prompt", "A", "--temperature", "1.2", "--top-p", "0.95", "--max-new-tokens", "20")
    texts = [generate(*drawn, "--seed", seed).stdout for seed in ("7", "7", "8")]
    assert texts[0] == texts[1] != texts[2]


def test_json_says_what_was_done(original):
    result = generate(original, "--prompt", "hello", "--json", "--max-new-tokens", "3", "--dtype", "bfloat16")
    assert (result.exit_code, result.stderr) == (0, "")
    told = json.loads(result.stdout)
    assert (told["model"], told["dtype"], told["device"], told["chat"]) == (original, "bfloat16", "cpu", True)
    assert told["new_tokens"] <= 3
    assert told["peak_memory_bytes"] > 1e7


def test_a_prompt_can_come_from_standard_input(packed):
    typed = generate(packed, "--prompt", "two\nlines", "--json", "--max-new-tokens", "4")
    for piped in ("two\nlines", "two\nlines\n", "two\nlines\r\n"):
        told = json.loads(generate(packed, "--prompt", "-", "--json", "--max-new-tokens", "4", stdin=piped).stdout)
        assert told["text"] == json.loads(typed.stdout)["text"]
        assert told["prompt_tokens"] == json.loads(typed.stdout)["prompt_tokens"]


def test_the_chat_template_can_be_switched_off(original):
    asked = (original, "--prompt", "hello", "--json", "--max-new-tokens", "1")
    default, chat, plain = (
        json.loads(generate(*asked, *switch).stdout) for switch in ((), ("--chat",), ("--no-chat",))
    )
    assert [each["chat"] for each in (default, chat, plain)] == [True, True, False]
    # The template of the tiny tokenizer puts one token before the message and one after it.
    assert default["prompt_tokens"] == chat["prompt_tokens"] == plain["prompt_tokens"] + 2


def test_the_text_ends_where_the_context_does(packed):
    prompt = "if " * 250
    tokens = len(tiny_tokenizer()(prompt)["input_ids"])
    assert 490 < tokens < 512
    result = generate(packed, "--prompt", prompt, "--max-new-tokens", "10000")
    assert result.exit_code == 0, result.output
    assert f"new {512 - tokens} tokens" in result.stderr
    assert "tokens/s, where the context ended;" in result.stderr


def test_an_interruption_leaves_the_text_and_ends_with_130(packed, monkeypatch):
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


def test_threads_can_be_chosen(packed, monkeypatch):
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
    "unknown dtype": (["{packed}", "--prompt", "a", "--dtype", "int8"], "'--dtype'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_one_sentence_before_a_model_is_loaded(case, packed, tmp_path, monkeypatch):
    monkeypatch.setattr(Opened, "load", lambda *_: pytest.fail("a model was loaded"))
    encoder = save_tiny_vision("vit-bare", tmp_path / "encoder")
    names = {"packed": packed, "empty": tmp_path, "encoder": encoder, "long": "long " * 600}
    arguments, message = BAD[case]
    result = generate(*(argument.format(**names) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert message.format(**names) in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_bytes_that_are_no_text_are_refused(packed):
    result = generate(packed, "--prompt", "-", stdin=b"\xff\xfe\x00")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "not valid UTF-8 text" in result.stderr
