"""`evaluate` for vision models: from opened models and the name of a data set to a result."""

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
        data, data_fingerprint: name of the test images, and SHA-256 over all their names and the bytes of some.
        available: number of images; images: number used; unreadable: number left out as unreadable.
        labelled: whether the images have classes.
        image_shape: channels, height and width as the models read them.
        device: device of the computation.
        original: the model that the others are compared with, if given.
        models: in the order given.
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
        """The evaluation as JSON types; each model is one flat table of its `info` and `score`."""
        models = [model.to_dict() for model in self.models]
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

    opened: the models, the original first if `compared`. dataset: see `load_images`; at most `max_images` images are
    used, evenly spaced over the data set. All models are in memory at once, so that they see the same batches and the
    original runs once.

    Raises:
        ShiftaddError: a problem with a model or the images, or labels that a model lacks.
    """
    data = load_images(dataset, split="test")
    readers = [ImageReader.of(model.load_image_processor(), model.config, model.spec) for model in opened]
    order = spread(len(data), max_images)
    classes = None if data.labels is None else _classes(data, opened)
    first = _common_input(readers, data, order)
    loaded = [model.load(dtype, device) for model in opened]
    pairs = [(model.info.spec, model.model) for model in loaded]
    start = 1 if compared else 0
    used: list[int] = []
    scores, original_score = score_image_models(
        pairs[start:],
        _batches(data, readers[0], order, classes, batch_size, used, show_progress=show_progress),
        original=pairs[0] if compared else None,
    )

    def measured(model: Loaded, score: ImageScore) -> ModelResult[ImageScore]:
        return ModelResult(model.info, score, model.info.was_calibrated_on(data.fingerprint))

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
        models=tuple(measured(model, score) for model, score in zip(loaded[start:], scores, strict=True)),
    )


def _classes(data: ImageData, opened: Sequence[Opened]) -> Tensor:
    """The class of every image by the models' numbering, or by arbitrary numbers if no model has class scores."""
    assert data.labels is not None
    tables = [model.classes for model in opened]
    if all(table is None for table in tables):
        numbers = {label: number for number, label in enumerate(sorted(set(data.labels), key=str))}
        return torch.tensor([numbers[label] for label in data.labels])
    classes = [
        class_numbers(data.labels, table, data.name, model.spec)
        for table, model in zip(tables, opened, strict=True)
        if table is not None
    ]
    if any(not torch.equal(other, classes[0]) for other in classes[1:]):
        raise RecipeError("The models number their classes differently; evaluate them one by one.")
    return classes[0]


def _common_input(readers: Sequence[ImageReader], data: ImageData, order: Sequence[int]) -> Tensor:
    """The first image as the models read it, if all of them read it alike."""
    first: Tensor | None = None
    for reader in readers:
        _, pixels = next(read_images(data, reader, order))
        if first is not None and not torch.equal(pixels, first):
            raise RecipeError(
                f"{reader.name} and {readers[0].name} read images in different ways, so their numbers cannot be "
                "compared; evaluate them one by one."
            )
        first = pixels
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
    """Batches of readable images and their classes; appends the indices of the images to `used`."""
    images: Iterator[tuple[int, Tensor]] = read_images(data, reader, order)
    if show_progress:
        images = progress(images, total=len(order), desc="Evaluating")
    while batch := list(islice(images, batch_size)):
        indices = [index for index, _ in batch]
        used += indices
        yield torch.stack([pixels for _, pixels in batch]), None if classes is None else classes[indices]
