"""Fills a table of vision models, see `quality.bench`."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.quality.bench import Bench
from experiments.vision.conditions import ImageConditions
from experiments.vision.rows import ImageTestScore


@dataclass
class ImageBench(Bench[ImageTestScore]):
    """A table of vision models, measured on images."""

    conditions: ImageConditions
