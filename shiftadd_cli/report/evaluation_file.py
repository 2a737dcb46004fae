"""evaluation.json in a checkpoint folder: results of `shiftadd evaluate --save`, for the page of `shiftadd report`.

    {"schema_version": 1, "evaluations": [{"text": "...", "context": 512, ..., "original": {...}, "model": {...}}]}

A language model has one entry for each combination of text, context, window start, number of tokens, original and
dtype. A vision model has one for each set of images, number of images, original and dtype. Repeating a measurement
replaces its entry.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import Field, ValidationError

from shiftadd_cli.artifact.folder import read_json
from shiftadd_cli.artifact.output import is_checkpoint
from shiftadd_cli.errors import ArtifactError, OutputError, first_fault
from shiftadd_cli.evaluation.compare import Evaluation
from shiftadd_cli.evaluation.compare_images import ImageEvaluation
from shiftadd_cli.evaluation.result import ModelResult
from shiftadd_cli.paths import expanded
from shiftadd_cli.report.uncertainty import share_with_error, with_error
from shiftadd_cli.storage.file_part import FilePart
from shiftadd_cli.storage.refusals import write_file

EVALUATION_FILE = "evaluation.json"


_Kind = TypeVar("_Kind", bound=FilePart)


class Quality(NamedTuple):
    """A measurement as a page shows it: the metric, its value for the model and for the original, the divergence from
    the original and its unit, the share of equal predictions, and the data."""

    what: str
    value: str
    original: str | None
    divergence: str | None
    unit: str
    agreement: str | None
    on: str


class ScoreReport(FilePart):
    """Scores of one model; an infinite perplexity is null."""

    spec: Annotated[str, Field(description="The model as named on the command line.")]
    dtype: str
    perplexity: float | None
    perplexity_error: float | None
    kl: Annotated[float | None, Field(description="KL(original || model), nats per token; null without an original.")]
    kl_error: float | None
    agreement: Annotated[float | None, Field(description="Share of tokens with the same most probable next token.")]
    calibrated_on_test: bool


class EvaluationReport(FilePart):
    """The folder's model, and optionally its original, measured on one text."""

    text: str
    text_fingerprint: Annotated[str, Field(description="SHA-256 of the text.")]
    tokens: int
    scored_tokens: int
    context: int
    window_start: Annotated[str, Field(description="Special tokens that every window begins with; not scored.")] = ""
    device: str
    original: ScoreReport | None
    model: ScoreReport

    @property
    def key(self) -> tuple[object, ...]:
        """The identity of the measurement: equal keys replace each other."""
        original = None if self.original is None else self.original.spec
        return self.text_fingerprint, self.tokens, self.context, self.window_start, original, self.model.dtype

    @property
    def quality(self) -> Quality:
        """The measurement as text, for a page."""
        own, other = self.model, self.original
        return Quality(
            "perplexity",
            with_error(own.perplexity, own.perplexity_error, 3),
            None if other is None else with_error(other.perplexity, other.perplexity_error, 3),
            None if own.kl is None else with_error(own.kl, own.kl_error, 4),
            "nats a token",
            None if own.agreement is None else f"{own.agreement:.1%}",
            f"{self.text}, {self.scored_tokens:,} tokens, context {self.context}"
            + (f", windows begin with {self.window_start}" if self.window_start else ""),
        )


class ImageScoreReport(FilePart):
    """Scores of one vision model, see `evaluation.images.ImageScore`; shares are from 0 to 1, and scores that cannot be
    measured are null."""

    spec: Annotated[str, Field(description="The model as named on the command line.")]
    dtype: str
    top1: float | None
    top1_error: float | None
    top5: float | None
    top5_error: float | None
    neighbours: Annotated[
        float | None, Field(description="Share of images whose nearest neighbours share their class.")
    ]
    neighbours_error: float | None
    kl: Annotated[float | None, Field(description="KL(original || model), nats per image; null without an original.")]
    kl_error: float | None
    agreement: Annotated[float | None, Field(description="Share of images with the same most probable class.")]
    agreement_error: float | None
    cosine: Annotated[float | None, Field(description="Mean cosine of the features with the original's.")]
    cosine_error: float | None
    calibrated_on_test: bool


class ImageEvaluationReport(FilePart):
    """The folder's vision model, and optionally its original, measured on one set of images."""

    data: str
    data_fingerprint: Annotated[str, Field(description="SHA-256 over the names of all images and the bytes of some.")]
    images: Annotated[int, Field(description="Number of images used.")]
    device: str
    original: ImageScoreReport | None
    model: ImageScoreReport

    @property
    def key(self) -> tuple[object, ...]:
        """The identity of the measurement: equal keys replace each other."""
        original = None if self.original is None else self.original.spec
        return self.data_fingerprint, self.images, original, self.model.dtype

    @property
    def quality(self) -> Quality:
        """The measurement as text, for a page: accuracy if there are labels, otherwise the similarity of features."""
        own, other = self.model, self.original
        measures = {"top1": "top-1", "neighbours": "nearest neighbours", "cosine": "cosine with the original"}
        name = next((measure for measure in measures if getattr(own, measure) is not None), "agreement")
        return Quality(
            measures.get(name, "same top class"),
            _share(own, name),
            None if other is None or name in ("agreement", "cosine") else _share(other, name),
            None if own.kl is None else with_error(own.kl, own.kl_error, 4),
            "nats an image",
            None if own.agreement is None else _share(own, "agreement"),
            f"{self.data}, {self.images:,} images",
        )


class EvaluationFile(FilePart):
    """evaluation.json."""

    schema_version: Literal[1] = 1
    evaluations: list[EvaluationReport | ImageEvaluationReport]


def load_evaluations(folder: Path) -> tuple[EvaluationReport | ImageEvaluationReport, ...]:
    """The evaluations saved with a checkpoint, in the order of their first run. Raises ArtifactError if damaged."""
    path = folder / EVALUATION_FILE
    if not path.is_file():
        return ()
    try:
        return tuple(EvaluationFile.model_validate(read_json(path)).evaluations)
    except ValidationError as failure:
        keys, message = first_fault(failure)
        raise ArtifactError(
            f"{path} is not a file that `shiftadd evaluate --save` writes ({', '.join(keys)}: {message}); delete it, "
            "and evaluate again."
        ) from None


def check_saving(models: Sequence[str]) -> None:
    """Refuse, before any work, models whose results cannot be saved.

    Raises OutputError if no model is a compressed folder, or if a folder is not writable; ArtifactError if a file there
    is damaged.
    """
    folders = [folder for spec in models if (folder := _folder(spec)) is not None]
    if not folders:
        raise OutputError("`save` writes results to compressed folders, and none is given; leave it out.")
    for folder in folders:
        load_evaluations(folder)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OutputError(f"No permission to write in {folder}; leave `save` out.")


def save_evaluations(result: Evaluation | ImageEvaluation) -> list[Path]:
    """Add the results to evaluation.json in every compressed folder among the models; returns the files.

    Raises ArtifactError if a file there is damaged, OutputError if one cannot be written.
    """
    written = []
    models: Sequence[ModelResult[Any]] = result.models
    for measured in models:
        if (folder := _folder(measured.info.spec)) is None:
            continue
        entry: EvaluationReport | ImageEvaluationReport
        if isinstance(result, ImageEvaluation):
            entry = _entry(ImageEvaluationReport, ImageScoreReport, result, measured)
        else:
            entry = _entry(EvaluationReport, ScoreReport, result, measured)
        entries = {earlier.key: earlier for earlier in load_evaluations(folder)} | {entry.key: entry}
        path = folder / EVALUATION_FILE
        write_file(path, EvaluationFile(evaluations=list(entries.values())).model_dump_json(indent=2) + "\n")
        written.append(path)
    return written


def _folder(spec: str) -> Path | None:
    """The folder that `spec` names, if it is a local shiftadd checkpoint."""
    path = expanded(spec)
    return path if is_checkpoint(path) else None


def _entry(kind: type[_Kind], scores: type[FilePart], result: Any, measured: ModelResult[Any]) -> _Kind:
    """The entry for one model and the original; data fields are copied from `result` by name."""
    data = {name: getattr(result, name) for name in kind.model_fields if name not in ("original", "model")}
    original = None if result.original is None else _score(scores, result.original)
    return kind.model_validate({**data, "original": original, "model": _score(scores, measured)})


def _score(kind: type[_Kind], measured: ModelResult[Any]) -> _Kind:
    flat = measured.to_dict()
    return kind(**{name: flat[name] for name in kind.model_fields})


def _share(score: ImageScoreReport, name: str) -> str:
    value, error = getattr(score, name), getattr(score, f"{name}_error")
    return with_error(value, error, 4) if name == "cosine" else share_with_error(value, error, 1)
