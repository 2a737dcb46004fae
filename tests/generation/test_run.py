"""Texts consist of the likeliest tokens or of seeded draws, and are timed at the right moments."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny
from transformers import GenerationConfig

from shiftadd_cli.errors import NumericalError
from shiftadd_cli.generation.prompt import Prompt, encode_prompt
from shiftadd_cli.generation.run import Generated, generate_text
from shiftadd_cli.generation.sampling import Sampling
from shiftadd_cli.runtime.opened import Loaded, load_any


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny("llama", tmp_path_factory.mktemp("models") / "one"))


@pytest.fixture
def loaded(folder: str) -> Loaded:
    return load_any(folder)


def prompt_of(loaded: Loaded) -> Prompt:
    return encode_prompt("The import statement", loaded.tokenizer, name="m", chat=False)


def likeliest(loaded: Loaded, ids: tuple[int, ...], count: int) -> list[int]:
    """Greedy decoding without a cache, as an independent reference."""
    tokens = list(ids)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(loaded.model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens


def without_ends(loaded: Loaded) -> Loaded:
    """The same model without end tokens, so that texts have the requested length."""
    loaded.model.generation_config.eos_token_id = None
    loaded.tokenizer.eos_token = None
    return loaded


def test_temperature_0_takes_the_likeliest_tokens(loaded: Loaded) -> None:
    prompt = prompt_of(without_ends(loaded))
    tokens = likeliest(loaded, prompt.ids, 12)
    decode = loaded.tokenizer.decode
    shown: list[str] = []
    result = generate_text(loaded, prompt, Sampling(max_new_tokens=12), write=shown.append)
    assert decode(prompt.ids, skip_special_tokens=True) + result.text == decode(tokens, skip_special_tokens=True)
    assert "".join(shown) == result.text
    assert len(shown) > 3
    assert (result.prompt_tokens, result.new_tokens, result.stopped) == (len(prompt.ids), 12, "length")


def test_generation_settings_of_the_checkpoint_are_ignored(loaded: Loaded) -> None:
    prompt = prompt_of(without_ends(loaded))
    plain = generate_text(loaded, prompt, Sampling(max_new_tokens=12))
    loaded.model.generation_config = GenerationConfig(do_sample=True, repetition_penalty=5.0, max_length=3)
    assert generate_text(loaded, prompt, Sampling(max_new_tokens=12)).text == plain.text


def test_the_seed_determines_the_draws(loaded: Loaded) -> None:
    prompt = prompt_of(without_ends(loaded))

    def text(**fields: Any) -> str:
        return generate_text(loaded, prompt, Sampling(max_new_tokens=16, **fields)).text

    assert text(temperature=1.0, seed=1) == text(temperature=1.0, seed=1)
    assert text(temperature=1.0, seed=1) != text(temperature=1.0, seed=2)
    # This top_p leaves only the likeliest token, and this temperature gives it all the probability.
    assert text(temperature=1.0, top_p=1e-6) == text() == text(temperature=1e-4)
    assert text(temperature=1.0, seed=1) != text()


@pytest.mark.parametrize("where", ["checkpoint", "tokenizer"])
def test_end_tokens_end_the_text(loaded: Loaded, where: str) -> None:
    prompt = prompt_of(without_ends(loaded))
    tokens = likeliest(loaded, prompt.ids, 12)[len(prompt.ids) :]
    last = tokens[6]
    if where == "checkpoint":
        loaded.model.generation_config.eos_token_id = [319, last]
    else:
        loaded.tokenizer.eos_token = loaded.tokenizer.convert_ids_to_tokens(last)
    result = generate_text(loaded, prompt, Sampling(max_new_tokens=12))
    assert (result.new_tokens, result.stopped) == (tokens.index(last) + 1, "end")


def test_the_end_of_the_context_ends_the_text(loaded: Loaded) -> None:
    cut_off = generate_text(without_ends(loaded), prompt_of(loaded), Sampling(max_new_tokens=12), room=5)
    assert (cut_off.new_tokens, cut_off.stopped) == (5, "context")
    complete = generate_text(without_ends(loaded), prompt_of(loaded), Sampling(max_new_tokens=5), room=5)
    assert (complete.new_tokens, complete.stopped) == (5, "length")


def test_prefill_ends_with_the_first_token_and_decode_with_the_last(loaded: Loaded) -> None:
    ticks = itertools.count(100)
    prompt = prompt_of(without_ends(loaded))
    result = generate_text(loaded, prompt, Sampling(max_new_tokens=9), now=lambda: float(next(ticks)))
    # One reading at the start and one per token.
    assert (result.prefill_seconds, result.decode_seconds) == (1.0, 8.0)
    assert result.prefill_rate == len(prompt.ids)
    assert result.decode_rate == 1.0


def test_rates_are_tokens_over_seconds() -> None:
    result = Generated("text", 30, [7] * 11, prefill_seconds=0.5, decode_seconds=2.0, stopped="length")
    assert (result.prefill_rate, result.decode_rate) == (60.0, 5.0)
    assert result.to_dict()["decode_tokens_per_second"] == 5.0
    assert Generated("t", 30, [7], 0.5, 0.0, "length").decode_rate is None


def test_nan_logits_are_refused(loaded: Loaded) -> None:
    loaded.model.model.norm.weight.data[0] = torch.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(NumericalError, match="not finite in float32"):
            generate_text(loaded, prompt_of(loaded), Sampling(temperature=temperature))


def test_an_interruption_stops_the_text_at_once(loaded: Loaded) -> None:
    shown: list[str] = []

    def write(piece: str) -> None:
        shown.append(piece)
        if len(shown) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_text(without_ends(loaded), prompt_of(loaded), Sampling(max_new_tokens=50), write=write)
    assert len(shown) == 3


def test_compressed_models_write_the_same_as_decoded_ones(tmp_path: Path) -> None:
    from artifacts import write_checkpoint
    from tiny_models import tiny_model, tiny_tokenizer

    checkpoint = write_checkpoint(tiny_model("llama"), tmp_path / "packed", tables=True)
    tiny_tokenizer().save_pretrained(checkpoint.folder)
    loaded = without_ends(load_any(str(checkpoint.folder)))
    prompt = prompt_of(loaded)
    text = generate_text(loaded, prompt, Sampling(max_new_tokens=10)).text
    tokens = likeliest(loaded._replace(model=checkpoint.dense), prompt.ids, 10)
    decode = loaded.tokenizer.decode
    assert decode(prompt.ids) + text == decode(tokens)
