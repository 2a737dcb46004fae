"""Prefill, decode and batches of images are timed at the right moments."""

from __future__ import annotations

import torch
from benchmark_clocks import ticking
from tiny_models import tiny_model
from tiny_vision import IMAGE_SIZE, tiny_vision_model

from shiftadd_cli.benchmark.timing import Span
from shiftadd_cli.benchmark.work import image_work, text_work, time_generation


def test_prefill_ends_with_the_first_token_and_decode_with_the_last() -> None:
    model = tiny_model("llama")
    prompts = torch.arange(20).reshape(2, 10)
    assert time_generation(model, ticking(cores=2), prompts, 7) == (Span(1.0, 2.0), Span(6.0, 12.0))
    assert time_generation(model, ticking(), prompts[:1], 1) == (Span(1.0, 1.0), Span(0.0, 0.0))


def test_end_tokens_and_settings_of_the_checkpoint_change_nothing() -> None:
    model = tiny_model("llama")
    model.generation_config.eos_token_id = list(range(320))
    model.generation_config.num_beams = 3
    assert time_generation(model, ticking(), torch.arange(4)[None], 9)[1].wall == 8.0


def test_decode_follows_the_shortest_prompt() -> None:
    model = tiny_model("llama")
    short, long = text_work(torch.arange(12), (5, 12), 4, 3)
    # A batch of three prompts of 5 or 12 tokens; decode covers 3 of the 4 new tokens of each.
    assert short.parts == (("prefill of 5", 15), ("decode", 9))
    assert long.parts == (("prefill of 12", 36),)
    assert [span.wall for span in short.run(model, ticking())] == [1.0, 3.0]
    assert long.run(model, ticking())[0].wall == 1.0


def test_batches_have_the_requested_number_of_images() -> None:
    model = tiny_vision_model("vit").bfloat16()
    inputs: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda _, args, named: inputs.append((*args, *named.values())[0]), with_kwargs=True)
    one, many = image_work(torch.zeros(3, IMAGE_SIZE, IMAGE_SIZE), (1, 5))
    assert (one.parts, many.parts) == ((("batch of 1", 1),), (("batch of 5", 5),))
    assert one.run(model, ticking()) == (Span(1.0, 1.0),)
    assert many.run(model, ticking(cores=2)) == (Span(1.0, 2.0),)
    assert [len(pixels) for pixels in inputs] == [1, 5]
    assert {pixels.dtype for pixels in inputs} == {torch.bfloat16}
