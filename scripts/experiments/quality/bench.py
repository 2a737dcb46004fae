"""Fills a table: reads the rows on disk, makes and measures the others, and writes each as soon as it is known."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel

from experiments.quality.conditions import Cell, Conditions, TableConditions, machine
from experiments.quality.making import MakingError, make_artifact, read_report
from experiments.quality.rows import OriginalOf, RowOf, TestScore, file_name, read_stored, write_stored
from shiftadd_cli.code_fingerprint import code_fingerprint
from shiftadd_cli.errors import ShiftaddError
from shiftadd_cli.evaluation.compare import Evaluation, evaluate
from shiftadd_cli.evaluation.compare_images import ImageEvaluation
from shiftadd_cli.evaluation.images import ImageScore
from shiftadd_cli.evaluation.perplexity import Score
from shiftadd_cli.evaluation.result import ModelResult

S = TypeVar("S", bound=BaseModel)


@dataclass
class Bench(Generic[S]):
    """A table in the folder `work`; its scores have the type `S`.

    Attributes:
        together: compressed models measured at once, with one run of the original.
        keep_artifacts: leave compressed models in `work` after measuring them.
        say: receives lines about the progress.
        rows: finished rows by their index in `cells`; failed: errors of the others.
    """

    conditions: TableConditions[S]
    cells: Sequence[Cell]
    work: Path
    together: int = 1
    keep_artifacts: bool = False
    say: Callable[[str], None] = print
    original: OriginalOf[S] | None = None
    rows: dict[int, RowOf[S]] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)

    def fill(self, finished: Callable[[], None]) -> None:
        """Read or measure every row; calls `finished` whenever there are new ones."""
        self.original = read_stored(self._original_path, self.conditions.original_kind, self.conditions.scoring)
        for index, cell in enumerate(self.cells):
            row = read_stored(self._row_path(cell), self.conditions.row_kind, cell.row_settings)
            if row is not None:
                self.rows[index] = row.model_copy(update={"method": cell.method.label})
        missing = [index for index in range(len(self.cells)) if index not in self.rows]
        self.say(f"{len(self.rows)} of {len(self.cells)} rows already exist.")
        for start in range(0, len(missing), self.together):
            self._fill_some(missing[start : start + self.together])
            finished()
        if self.original is None:
            self._measure([])
        finished()

    def _fill_some(self, indices: Sequence[int]) -> None:
        artifacts: dict[int, Path] = {}
        for index in indices:
            cell = self.cells[index]
            self.say(f"{cell.method.label}, {cell.bits} bits: quantizing")
            try:
                artifacts[index] = make_artifact(cell, self.conditions.model, self.work)
            except ShiftaddError as error:
                self._fail(index, error)
        try:
            scores = self._measure([str(path) for path in artifacts.values()]) if artifacts else []
        except ShiftaddError as error:
            if len(artifacts) == 1:
                self._fail(next(iter(artifacts)), error)
            else:
                # One of them cannot be measured, but the others can.
                for index in artifacts:
                    self._fill_some([index])
            return
        for (index, path), score in zip(artifacts.items(), scores, strict=True):
            cell = self.cells[index]
            row = self.conditions.row_kind(
                settings=cell.row_settings,
                scores=score,
                machine=machine(),
                code=code_fingerprint(),
                method=cell.method.label,
                bits=cell.bits,
                **read_report(cell, path),
            )
            write_stored(self._row_path(cell), row)
            self.rows[index] = row
            if not self.keep_artifacts:
                shutil.rmtree(path)

    def _fail(self, index: int, error: ShiftaddError) -> None:
        self.failed[index] = error.reason if isinstance(error, MakingError) else str(error)
        self.say(f"{self.cells[index].method.label}, {self.cells[index].bits} bits: {error}")

    def _measure(self, artifacts: Sequence[str]) -> list[dict[str, S]]:
        """Scores by test of each artifact. Scores of the original are written if they are not known yet."""
        conditions = self.conditions
        self.say(f"measuring {len(artifacts)} compressed models and the original")
        evaluations = {
            name: evaluate(
                artifacts,
                against=conditions.model,
                dataset=spec,
                show_progress=False,
                **conditions.evaluation_options,
            )
            for name, spec in conditions.tests.items()
        }
        if self.original is None:
            originals = {name: evaluation.original for name, evaluation in evaluations.items() if evaluation.original}
            info = next(iter(originals.values())).info
            self.original = conditions.original_kind(
                settings=conditions.scoring,
                scores={name: self._score(evaluations[name], original) for name, original in originals.items()},
                machine=machine(),
                file_bits_per_weight=info.file_bits_per_weight,
                parameters=info.parameters,
            )
            write_stored(self._original_path, self.original)
        return [
            {name: self._score(evaluation, evaluation.models[index]) for name, evaluation in evaluations.items()}
            for index in range(len(artifacts))
        ]

    def _score(
        self, evaluation: Evaluation | ImageEvaluation, measured: ModelResult[Score] | ModelResult[ImageScore]
    ) -> S:
        """The stored scores of a measured model, and the conditions of the measurement."""
        kind, scores = self.conditions.score_kind, measured.to_dict()
        return kind(
            **{name: scores[name] if name in scores else getattr(evaluation, name) for name in kind.model_fields}
        )

    def ordered_rows(self) -> list[RowOf[S]]:
        """Finished rows, by bits and then in the order of the methods."""
        order = sorted(self.rows, key=lambda index: (self.cells[index].bits, index))
        return [self.rows[index] for index in order]

    def _row_path(self, cell: Cell) -> Path:
        return self.work / "rows" / cell.row_name

    @property
    def _original_path(self) -> Path:
        # Most originals have 16 bits. The number only completes the name.
        return self.work / "rows" / (file_name("original", 16, self.conditions.scoring) + ".json")


@dataclass
class TextBench(Bench[TestScore]):
    """A table of language models, measured on texts."""

    conditions: Conditions
