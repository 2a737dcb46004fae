"""`evaluate` for vision models: from opened models and the name of images to a result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from shiftadd_cli.data.images import ImageReader, load_images, read_images
from shiftadd_cli.data.images_data import ImageData, spread
from shiftadd_cli.errors import RecipeError
from shiftadd_cli.evaluation.images import ImageScore, score_image_models
from shiftadd_cli.evaluation.labels import class_numbers
from shiftadd_cli.evaluation.result import ModelResult
from shiftadd_cli.progress import progress
from shiftadd_cli.runtime.opened import Loaded, Opened


@dataclass(frozen=True)
class ImageEvaluation:
    """Vision models measured on one set of images.

    Attributes:
        data, data_fingerprint: name of the test images, and SHA-256 over the names of all and the bytes of some.
        available: how many there are; images: how many were used; unreadable: how many were left out.
        labelled: whether the images have classes.
        image_shape: channels, height and width as the models read them.
        device: where it was computed.
        original: the model the others are compared with, if one was given.
        models: in the order asked for.
    """

    data: str
    data_fingerprint: str
    available: int
    images: int
    unreadable: int
    labelled: bool
    image_shape: tuple[int, ...]
    device: str
    original: ModelResult[ImageScore] | None
    models: tuple[ModelResult[ImageScore], ...]

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON types; each model is one flat table of its `info` and `score`."""
        models = [each.to_dict() for each in self.models]
        return asdict(self) | {"original": self.original and self.original.to_dict(), "models": models}


def evaluate_images(
    opened: Sequence[Opened],
    *,
    compared: bool,
    dataset: str,
    max_images: int | None,
    batch_size: int,
    dtype: str,
    device: torch.device,
    show_progress: bool,
) -> ImageEvaluation:
    """Accuracy of vision models on labelled images, and their distance from an original, which needs no labels.

    opened: the models, the original first if `compared`. dataset: see `load_images`; of more than `max_images` images
    so many are used, evenly from the first to the last. All models are in memory at once, so that each sees the same
    batches and the original runs once.

    Raises:
        ShiftaddError: with what is wrong: a model, the images, or labels that a model does not have.
    """
    data = load_images(dataset, split="test")
    readers = [ImageReader.of(each.load_image_processor(), each.config, each.spec) for each in opened]
    order = spread(len(data), max_images)
    classes = None if data.labels is None else _classes(data, opened)
    first = _common_input(readers, data, order)
    loaded = [each.load(dtype, device) for each in opened]
    pairs = [(each.info.spec, each.model) for each in loaded]
    start = 1 if compared else 0
    used: list[int] = []
    scores, original_score = score_image_models(
        pairs[start:],
        _batches(data, readers[0], order, classes, batch_size, used, show_progress=show_progress),
        original=pairs[0] if compared else None,
    )

    def measured(each: Loaded, score: ImageScore) -> ModelResult[ImageScore]:
        return ModelResult(each.info, score, each.info.was_calibrated_on(data.fingerprint))

    return ImageEvaluation(
        data=data.name,
        data_fingerprint=data.fingerprint,
        available=len(data),
        images=len(used),
        unreadable=len(order) - len(used),
        labelled=classes is not None,
        image_shape=tuple(first.shape),
        device=str(device),
        original=None if original_score is None else measured(loaded[0], original_score),
        models=tuple(measured(each, score) for each, score in zip(loaded[start:], scores, strict=True)),
    )


def _classes(data: ImageData, opened: Sequence[Opened]) -> Tensor:
    """The class of every image, by the numbers of the models, or any numbers where they have no class scores."""
    assert data.labels is not None
    tables = [each.classes for each in opened]
    if all(table is None for table in tables):
        places = {label: number for number, label in enumerate(sorted(set(data.labels), key=str))}
        return torch.tensor([places[label] for label in data.labels])
    found = [
        class_numbers(data.labels, table, data.name, each.spec)
        for table, each in zip(tables, opened, strict=True)
        if table is not None
    ]
    if any(not torch.equal(each, found[0]) for each in found[1:]):
        raise RecipeError("The models number their classes differently; evaluate them one by one.")
    return found[0]


def _common_input(readers: Sequence[ImageReader], data: ImageData, order: Sequence[int]) -> Tensor:
    """The first image as the first model reads it, if all read it alike."""
    first: Tensor | None = None
    for reader in readers:
        _, found = next(read_images(data, reader, order))
        if first is not None and not torch.equal(found, first):
            raise RecipeError(
                f"{reader.name} and {readers[0].name} read images in different ways, so their numbers cannot be "
                "compared; evaluate them one by one."
            )
        first = found
    assert first is not None, "there is a model"
    return first


def _batches(
    data: ImageData,
    reader: ImageReader,
    order: Sequence[int],
    classes: Tensor | None,
    batch_size: int,
    used: list[int],
    *,
    show_progress: bool,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Batches of readable images and their classes; notes in `used` which were read."""
    images: Iterator[tuple[int, Tensor]] = read_images(data, reader, order)
    if show_progress:
        images = progress(images, total=len(order), desc="Evaluating")
    while batch := list(islice(images, batch_size)):
        indices = [index for index, _ in batch]
        used += indices
        yield torch.stack([pixels for _, pixels in batch]), None if classes is None else classes[indices]
