"""Rows of a table of vision models, on disk."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from experiments.quality.rows import OriginalOf, RowOf


class ImageTestScore(BaseModel):
    """Scores of one model on one set of images, as `ImageEvaluation` gives them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    top1: float | None
    top1_error: float | None
    top5: float | None
    top5_error: float | None
    neighbours: float | None
    neighbours_error: float | None
    kl: float | None
    kl_error: float | None
    agreement: float | None
    agreement_error: float | None
    cosine: float | None
    cosine_error: float | None
    images: int
    dtype: str
    device: str


ImageOriginal = OriginalOf[ImageTestScore]
ImageRow = RowOf[ImageTestScore]
