"""Accuracy of vision models on images, and their distance from an original, in one pass over the images."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shiftadd_cli.blockwise.distribution import Direction, Reference
from shiftadd_cli.blockwise.forward import Prediction, predict
from shiftadd_cli.device import dtype_name
from shiftadd_cli.errors import NumericalError, RecipeError
from shiftadd_cli.evaluation.neighbours import nearest_classes

_TOP = 5


@dataclass(frozen=True)
class ImageScore:
    """Scores of one model, per image; shares are from 0 to 1.

    Attributes:
        top1, top5: share of images whose class is the most probable, or among the five most probable.
        neighbours: share of images whose class the nearest other images vote for, see `evaluation.neighbours`; only for
            models without class scores.
        kl: mean KL(original || model) over the classes in nats; agreement: share of images for which original and model
            have the same most probable class.
        cosine: mean cosine of the features with the original's; only for models without class scores.
        seconds: time spent in this model.

    All but the last have a standard error, which treats images as independent draws and is None for a single image.
    Scores are None if there are no labels, no original, or no class scores.
    """

    top1: float | None = None
    top1_error: float | None = None
    top5: float | None = None
    top5_error: float | None = None
    neighbours: float | None = None
    neighbours_error: float | None = None
    kl: float | None = None
    kl_error: float | None = None
    agreement: float | None = None
    agreement_error: float | None = None
    cosine: float | None = None
    cosine_error: float | None = None
    seconds: float = 0.0


@dataclass
class _Sums:
    """Per-image values of one model, in tensors of `[batch]`."""

    values: dict[str, list[Tensor]] = field(default_factory=dict)
    features: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, name: str, values: Tensor) -> None:
        self.values.setdefault(name, []).append(values.double().cpu())


def score_image_models(
    models: Sequence[tuple[str, Any]],
    batches: Iterable[tuple[Tensor, Tensor | None]],
    *,
    original: tuple[str, Any] | None = None,
) -> tuple[list[ImageScore], ImageScore | None]:
    """Score vision models on images; every model sees the same batches.

    Args:
        models: (name for messages, transformers model in evaluation mode) pairs.
        batches: pixels float32 `[batch, channels, height, width]`, and int64 `[batch]` classes if there are labels.
        original: reference for divergence, agreement and cosine; it is scored as well.

    Returns:
        The scores in the order of `models`, and the score of the original.

    Raises:
        RecipeError: a model's output differs in kind or shape from the original's.
        NumericalError: predictions are not finite.
    """
    first = [] if original is None else [original]
    everyone = (*first, *models)
    sums = [_Sums() for _ in everyone]
    labels: list[Tensor] = []
    with torch.inference_mode():
        for pixels, classes in batches:
            if classes is not None:
                labels.append(classes)
            reference: Prediction | None = None
            for (name, model), total in zip(everyone, sums, strict=True):
                start = time.monotonic()
                prediction = predict(model, pixels.to(model.device))
                prediction = Prediction(prediction.values.float(), prediction.is_logits)
                if not torch.isfinite(prediction.values).all():
                    raise NumericalError(
                        f"{name} gives predictions that are not finite in {dtype_name(model.dtype)}; "
                        "try `dtype=float32`. If that does not help, the checkpoint is damaged."
                    )
                if reference is not None:
                    _compare(reference, prediction, name, everyone[0][0], total)
                elif first:
                    reference = prediction
                _score(prediction, classes, total)
                total.seconds += time.monotonic() - start
    scores = [_finish(total, torch.cat(labels) if labels else None) for total in sums]
    return scores[len(first) :], scores[0] if first else None


def _compare(reference: Prediction, prediction: Prediction, name: str, original: str, total: _Sums) -> None:
    if prediction.is_logits != reference.is_logits or prediction.values.shape != reference.values.shape:
        raise RecipeError(
            f"{name} gives {_in_words(prediction)} and {original} {_in_words(reference)}, so they cannot be compared; "
            "give the original that it was made from."
        )
    if prediction.is_logits:
        expected = Reference(reference.values.log_softmax(-1))
        total.add("kl", expected.divergence(prediction.values.log_softmax(-1)).clamp_min(0))
        total.add("agreement", prediction.values.argmax(-1) == expected.top)
    else:
        total.add("cosine", 1 - Direction(reference.values).divergence(prediction.values))


def _in_words(prediction: Prediction) -> str:
    return f"{prediction.values.shape[-1]} {'class scores' if prediction.is_logits else 'features'}"


def _score(prediction: Prediction, classes: Tensor | None, total: _Sums) -> None:
    if classes is None:
        return
    if not prediction.is_logits:
        total.features.append(prediction.values.cpu())
        return
    targets = classes.to(prediction.values.device)
    total.add("top1", prediction.values.argmax(-1) == targets)
    best = prediction.values.topk(min(_TOP, prediction.values.shape[-1])).indices
    total.add("top5", (best == targets.unsqueeze(-1)).any(-1))


def _finish(total: _Sums, classes: Tensor | None) -> ImageScore:
    start = time.monotonic()
    if total.features and classes is not None:
        features = torch.cat(total.features)
        if len(features) > 1:
            total.add("neighbours", nearest_classes(features, classes) == classes)
    scores: dict[str, float | None] = {}
    for name, parts in total.values.items():
        values = torch.cat(parts)
        scores[name] = values.mean().item()
        scores[f"{name}_error"] = values.std().item() / len(values) ** 0.5 if len(values) > 1 else None
    return ImageScore(**scores, seconds=total.seconds + time.monotonic() - start)
