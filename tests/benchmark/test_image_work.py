"""Looking at images is timed around the model alone."""

from __future__ import annotations

import torch
from benchmark_clocks import ticking
from tiny_vision import IMAGE_SIZE, tiny_vision_model

from shiftadd_cli.benchmark.image_work import image_work
from shiftadd_cli.benchmark.timing import Span


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
