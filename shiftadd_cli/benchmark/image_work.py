"""What a vision model does in a benchmark: look at images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shiftadd_cli.benchmark.timing import Clock, Span
from shiftadd_cli.benchmark.work import Work
from shiftadd_cli.calibration.forward import run_model


def image_work(pixels: Tensor, batches: Sequence[int]) -> list[Work]:
    """Looking at so many images at once: each of `pixels` `[channels, height, width]`, as the model's image processor
    makes them. What they show changes nothing about the time."""
    return [
        Work(partial(_look, pixels=pixels.expand(count, *pixels.shape)), ((f"batch of {count}", count),))
        for count in batches
    ]


@torch.inference_mode()
def _look(model: Any, clock: Clock, pixels: Tensor) -> tuple[Span]:
    images = pixels.to(model.dtype)
    start = clock.now()
    run_model(model, images)
    return (clock.now() - start,)
