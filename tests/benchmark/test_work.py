"""Reading and writing are timed at the right moments."""

from __future__ import annotations

import torch
from benchmark_clocks import ticking
from tiny_models import tiny_model
from tiny_vision import IMAGE_SIZE, tiny_vision_model

from shiftadd_cli.benchmark.timing import Span
from shiftadd_cli.benchmark.work import image_work, text_work, time_generation


def test_prefill_ends_with_the_first_token_and_decoding_with_the_last():
    model = tiny_model("llama")
    prompts = torch.arange(20).reshape(2, 10)
    assert time_generation(model, ticking(cores=2), prompts, 7) == (Span(1.0, 2.0), Span(6.0, 12.0))
    assert time_generation(model, ticking(), prompts[:1], 1) == (Span(1.0, 1.0), Span(0.0, 0.0))


def test_no_token_ends_a_text_early_and_settings_of_the_checkpoint_change_nothing():
    model = tiny_model("llama")
    model.generation_config.eos_token_id = list(range(320))
    model.generation_config.num_beams = 3
    assert time_generation(model, ticking(), torch.arange(4)[None], 9)[1].wall == 8.0


def test_what_is_written_comes_after_the_shortest_prompt():
    model = tiny_model("llama")
    short, long = text_work(torch.arange(12), (5, 12), 4, 3)
    # Three texts at once: of 5 or 12 tokens, and 3 of the 4 new ones each after the first.
    assert short.parts == (("prefill of 5", 15), ("decode", 9))
    assert long.parts == (("prefill of 12", 36),)
    assert [span.wall for span in short.run(model, ticking())] == [1.0, 3.0]
    assert long.run(model, ticking())[0].wall == 1.0


def test_every_batch_is_of_so_many_images():
    model = tiny_vision_model("vit").bfloat16()
    seen = []
    model.register_forward_pre_hook(lambda _, args, named: seen.append((*args, *named.values())[0]), with_kwargs=True)
    one, many = image_work(torch.zeros(3, IMAGE_SIZE, IMAGE_SIZE), (1, 5))
    assert (one.parts, many.parts) == ((("batch of 1", 1),), (("batch of 5", 5),))
    assert one.run(model, ticking()) == (Span(1.0, 1.0),)
    assert many.run(model, ticking(cores=2)) == (Span(1.0, 2.0),)
    assert [len(pixels) for pixels in seen] == [1, 5]
    assert {pixels.dtype for pixels in seen} == {torch.bfloat16}
