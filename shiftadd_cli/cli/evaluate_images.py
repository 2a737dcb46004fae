"""Output of `shiftadd evaluate` for vision models, and the lines that all models share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shiftadd_cli.evaluation.compare_images import ImageEvaluation
    from shiftadd_cli.evaluation.result import ModelResult

# Score columns: field, title, whether it is a share. Columns that no model has are omitted.
_SCORES = (
    ("top1", "top-1", True),
    ("top5", "top-5", True),
    ("neighbours", "nearest neighbours", True),
    ("kl", "KL, nats/image", False),
    ("agreement", "same top class", True),
    ("cosine", "cosine of features", False),
)


def describe_images(result: ImageEvaluation) -> str:
    """The result as text."""
    from shiftadd_cli.cli.summary import table
    from shiftadd_cli.sizes import size

    everyone = ([] if result.original is None else [result.original]) + list(result.models)
    shown = [column for column in _SCORES if any(getattr(model.score, column[0]) is not None for model in everyone)]
    header = ["model", *(title for _, title, _ in shown), "size", "file bits/weight", "layer bits/weight", "seconds"]
    rows = []
    for model in everyone:
        info = model.info
        layers = "-" if info.quantized_bits_per_weight is None else f"{info.quantized_bits_per_weight:.3f}"
        scores = [_score(model.score, name, share=share) for name, _, share in shown]
        numbers = (size(info.file_bytes), f"{info.file_bits_per_weight:.3f}", layers, f"{model.score.seconds:.1f}")
        rows.append([info.spec, *scores, *numbers])
    part = "" if result.images == result.available else f" ({result.images:,} used)"
    lines = [
        table(header, rows),
        "",
        f"Images        {result.data}: {result.available:,}{part}, {'with' if result.labelled else 'without'} labels, "
        f"read as {' x '.join(map(str, result.image_shape))}",
        f"Computed      {computed(everyone)} on {result.device}",
        *calibrations(everyone),
    ]
    if result.unreadable:
        lines.append(f"Unreadable    {result.unreadable:,} images, left out")
    if result.original is not None:
        lines.append(f"Original      {result.original.info.spec}; KL is KL(original || model)")
    return "\n".join(lines)


def computed(everyone: Sequence[ModelResult[Any]]) -> str:
    """The dtype of the computation, and the stored dtype where they differ; a single entry if all models agree."""
    ways = {
        model.info.spec: model.info.dtype
        + ("" if model.info.dtype == model.info.stored_dtype else f" (stored as {model.info.stored_dtype})")
        for model in everyone
    }
    if len(set(ways.values())) == 1:
        return f"in {next(iter(ways.values()))}"
    return ", ".join(f"{name} in {way}" for name, way in ways.items())


def calibrations(everyone: Sequence[ModelResult[Any]]) -> list[str]:
    """One line per compressed model with its calibration data."""
    return [
        f"Calibration   {model.info.spec}: {model.info.calibration or 'no data named in its report'}"
        for model in everyone
        if model.info.compressed
    ]


def _score(score: Any, name: str, *, share: bool) -> str:
    from shiftadd_cli.report.uncertainty import share_with_error, with_error

    value, error = getattr(score, name), getattr(score, f"{name}_error")
    return share_with_error(value, error, 2) if share else with_error(value, error, 4)
