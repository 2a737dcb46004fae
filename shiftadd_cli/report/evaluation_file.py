"""evaluation.json beside a checkpoint: what `shiftadd evaluate --save` measured, for the page of `shiftadd report`.

    {"schema_version": 1, "evaluations": [{"text": "...", "context": 512, ..., "original": {...}, "model": {...}}]}

One entry for each text, context, number of tokens, original and dtype; measuring the same again replaces it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shiftadd_cli.artifact.folder import read_json
from shiftadd_cli.artifact.output import is_checkpoint, write_file
from shiftadd_cli.errors import ArtifactError, OutputError
from shiftadd_cli.evaluation.compare import Evaluation
from shiftadd_cli.evaluation.measured import Measured
from shiftadd_cli.evaluation.perplexity import Score
from shiftadd_cli.faults import first_fault
from shiftadd_cli.runtime.skeleton import read_artifact_config
from shiftadd_cli.source.vision import vision_class

EVALUATION_FILE = "evaluation.json"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ScoreReport(_Part):
    """What one model scored; a perplexity is null where it is infinite."""

    spec: Annotated[str, Field(description="The model as it was named on the command line.")]
    dtype: str
    perplexity: float | None
    perplexity_error: float | None
    kl: Annotated[float | None, Field(description="KL(original || model), nats a token; null without an original.")]
    kl_error: float | None
    agreement: Annotated[float | None, Field(description="Share of tokens with the same most probable next one.")]
    calibrated_on_test: bool


class EvaluationReport(_Part):
    """The model of the folder, and perhaps its original, measured on one text."""

    text: str
    text_fingerprint: Annotated[str, Field(description="SHA-256 of the text.")]
    tokens: int
    scored_tokens: int
    context: int
    device: str
    original: ScoreReport | None
    model: ScoreReport

    @property
    def key(self) -> tuple[object, ...]:
        """What makes it the same measurement."""
        original = None if self.original is None else self.original.spec
        return self.text_fingerprint, self.tokens, self.context, original, self.model.dtype


class EvaluationFile(_Part):
    """evaluation.json."""

    schema_version: Literal[1] = 1
    evaluations: list[EvaluationReport]


def load_evaluations(folder: Path) -> tuple[EvaluationReport, ...]:
    """What was saved beside the checkpoint, in the order it was first measured. Raises ArtifactError if damaged."""
    path = folder / EVALUATION_FILE
    if not path.is_file():
        return ()
    try:
        return tuple(EvaluationFile.model_validate(read_json(path)).evaluations)
    except ValidationError as failure:
        place, message = first_fault(failure)
        raise ArtifactError(
            f"{path} is not what `shiftadd evaluate --save` writes ({', '.join(place)}: {message}); delete it, and "
            "evaluate again."
        ) from None


def check_saving(models: Sequence[str]) -> None:
    """Refuse, before any work, models of which nothing can be saved.

    Raises OutputError if none is a compressed folder, or one cannot be written; ArtifactError for a damaged file.
    """
    folders = [folder for spec in models if (folder := _folder(spec)) is not None]
    if not folders:
        raise OutputError("--save keeps what is measured in a compressed folder, and none is given; leave it out.")
    for folder in folders:
        if vision_class(read_artifact_config(folder), str(folder)) is not None:
            raise OutputError(f"--save keeps what is measured on texts, and {folder} reads images; leave it out.")
        load_evaluations(folder)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OutputError(f"No permission to write in {folder}; leave --save out.")


def save_evaluations(result: Evaluation) -> list[Path]:
    """Add what was measured to the file of every compressed folder among the models; returns the files.

    Raises ArtifactError if a file there is damaged, OutputError if one cannot be written.
    """
    written = []
    for measured in result.models:
        if (folder := _folder(measured.info.spec)) is None:
            continue
        entry = EvaluationReport(
            text=result.text,
            text_fingerprint=result.text_fingerprint,
            tokens=result.tokens,
            scored_tokens=result.scored_tokens,
            context=result.context,
            device=result.device,
            original=None if result.original is None else _score(result.original),
            model=_score(measured),
        )
        entries = {each.key: each for each in load_evaluations(folder)} | {entry.key: entry}
        path = folder / EVALUATION_FILE
        write_file(path, EvaluationFile(evaluations=list(entries.values())).model_dump_json(indent=2) + "\n")
        written.append(path)
    return written


def _folder(spec: str) -> Path | None:
    """The folder of a checkpoint of ours on this machine that was named by its path."""
    path = Path(spec).expanduser()
    return path if is_checkpoint(path) else None


def _score(measured: Measured[Score]) -> ScoreReport:
    flat = measured.to_dict()
    return ScoreReport(**{name: flat[name] for name in ScoreReport.model_fields})
