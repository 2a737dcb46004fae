"""Filling a table of vision models: rows on disk are read, the others made and measured, each written at once."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from quality.conditions import Cell, machine, sources, versions
from quality.making import make_artifact, read_report
from quality.methods import Method
from quality.rows import file_name, read_stored, write_stored

from shiftadd_cli.calibration.images import load_images
from shiftadd_cli.errors import CalibrationError, RecipeError, ShiftaddError
from shiftadd_cli.evaluation.compare import evaluate
from shiftadd_cli.evaluation.compare_images import ImageEvaluation
from shiftadd_cli.source import open_source
from vision.rows import ImageOriginal, ImageRow, ImageTestScore


@dataclass
class ImageConditions:
    """The model and the images of a table. model, calibration, test: as typed; dtype: computed in, see `evaluate`."""

    model: str
    calibration: str
    samples: int
    seed: int
    test: str
    max_images: int | None
    dtype: str

    def __post_init__(self) -> None:
        self.model_fingerprint = open_source(self.model).fingerprint
        self.calibration_fingerprint = load_images(self.calibration, split="calibration").fingerprint
        self.test_fingerprint = load_images(self.test, split="test").fingerprint
        if self.test_fingerprint == self.calibration_fingerprint:
            raise CalibrationError(f"{self.test} is both calibrated on and the test; give other images.")

    @property
    def test_name(self) -> str:
        return Path(self.test).name

    @cached_property
    def scoring(self) -> dict[str, Any]:
        """The settings that fix how a model is scored."""
        return {
            "model": self.model_fingerprint,
            "test": self.test_fingerprint,
            "max_images": self.max_images,
            "dtype": self.dtype,
            "versions": versions(),
        }

    def cell(self, method: Method, bits: int) -> Cell:
        """Settle everything about one row. Raises RecipeError."""
        if method.peer is not None:
            raise RecipeError(f"Method {method.label}: peers compress language models alone.")
        recipe = method.resolve(
            bits, {"calibration": self.calibration, "samples": self.samples, "seed": self.seed, "dtype": self.dtype}
        )
        made = {
            "model": self.model_fingerprint,
            "peer": None,
            # The images count, not the name of their folder.
            "recipe": recipe.model_dump(mode="json", exclude={"calibration"}),
            "calibration": None if recipe.calibration == "none" else self.calibration_fingerprint,
            "versions": versions(),
        }
        return Cell(method, bits, recipe, made, {"artifact": made, "scoring": self.scoring})


@dataclass
class ImageBench:
    """A table in the folder `work`. `say` is told what happens; `failed` is what came of rows not made."""

    conditions: ImageConditions
    cells: Sequence[Cell]
    work: Path
    say: Callable[[str], None] = print
    original: ImageOriginal | None = None
    rows: dict[int, ImageRow] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)

    def fill(self, finished: Callable[[], None]) -> None:
        """Find or measure every row; `finished` is called whenever one is new."""
        self.original = read_stored(self._original_path, ImageOriginal, self.conditions.scoring)
        for index, cell in enumerate(self.cells):
            row = read_stored(self._row_path(cell), ImageRow, cell.row_settings)
            if row is not None:
                self.rows[index] = row.model_copy(update={"method": cell.method.label})
        self.say(f"{len(self.rows)} of {len(self.cells)} rows are there already.")
        for index, cell in enumerate(self.cells):
            if index not in self.rows:
                self._add(index, cell)
                finished()
        finished()

    def _add(self, index: int, cell: Cell) -> None:
        name = f"{cell.method.label}, {cell.bits} bits"
        self.say(f"{name}: quantizing")
        try:
            artifact = make_artifact(cell, self.conditions.model, self.work)
            self.say(f"{name}: measuring beside the original")
            score = self._measure(artifact)
        except ShiftaddError as error:
            self.failed[index] = str(error)
            self.say(f"{name}: {error}")
            return
        row = ImageRow(
            settings=cell.row_settings,
            scores={self.conditions.test_name: score},
            machine=machine(),
            code=sources(),
            method=cell.method.label,
            bits=cell.bits,
            **read_report(cell, artifact),
        )
        write_stored(self._row_path(cell), row)
        self.rows[index] = row
        shutil.rmtree(artifact)

    def _measure(self, artifact: Path) -> ImageTestScore:
        """The artifact's score; that of the original is written where it is not known yet."""
        conditions = self.conditions
        found = evaluate(
            [str(artifact)],
            against=conditions.model,
            dataset=conditions.test,
            max_images=conditions.max_images,
            batch_size=32,
            dtype=conditions.dtype,
            show_progress=False,
        )
        assert isinstance(found, ImageEvaluation), "vision models are measured on images"
        if self.original is None:
            assert found.original is not None
            info = found.original.info
            self.original = ImageOriginal(
                settings=conditions.scoring,
                scores={conditions.test_name: _score(found, found.original)},
                machine=machine(),
                file_bits_per_weight=info.file_bits_per_weight,
                parameters=info.parameters,
            )
            write_stored(self._original_path, self.original)
        return _score(found, found.models[0])

    def _row_path(self, cell: Cell) -> Path:
        return self.work / "rows" / cell.row_name

    @property
    def _original_path(self) -> Path:
        return self.work / "rows" / (file_name("original", 16, self.conditions.scoring) + ".json")


def _score(evaluation: ImageEvaluation, measured: Any) -> ImageTestScore:
    told = measured.to_dict()
    fields = {name: told[name] for name in ImageTestScore.model_fields if name in told}
    return ImageTestScore(**fields, images=evaluation.images, device=evaluation.device)
