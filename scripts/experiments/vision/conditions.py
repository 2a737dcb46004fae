"""The conditions that all rows of a table of vision models share, see `quality.conditions`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from experiments.quality.conditions import Cell, recipe_settings, versions
from experiments.quality.methods import Method
from experiments.vision.rows import ImageOriginal, ImageRow, ImageTestScore
from shiftadd_cli.data.images import load_images
from shiftadd_cli.errors import CalibrationError, RecipeError
from shiftadd_cli.source import open_source


@dataclass
class ImageConditions:
    """The model and the images of a table. model, calibration, test: as typed; dtype: of computation, see `evaluate`.

    Raises ShiftaddError if the model has no image processor, or is calibrated on the images of the test.
    """

    score_kind: ClassVar[type[ImageTestScore]] = ImageTestScore
    original_kind: ClassVar[type[ImageOriginal]] = ImageOriginal
    row_kind: ClassVar[type[ImageRow]] = ImageRow

    model: str
    calibration: str
    samples: int
    seed: int
    test: str
    max_images: int | None
    dtype: str

    def __post_init__(self) -> None:
        source = open_source(self.model)
        # Every row needs it; without this check each row would fail after its model was quantized.
        source.load_image_processor()
        self.model_fingerprint = source.fingerprint
        self.calibration_fingerprint = load_images(self.calibration, split="calibration").fingerprint
        self.test_fingerprint = load_images(self.test, split="test").fingerprint
        if self.test_fingerprint == self.calibration_fingerprint:
            raise CalibrationError(f"{self.test} is both the calibration set and the test; give other images.")

    @property
    def test_name(self) -> str:
        return Path(self.test).name

    @property
    def tests(self) -> dict[str, str]:
        return {self.test_name: self.test}

    @property
    def evaluation_options(self) -> dict[str, Any]:
        return {"max_images": self.max_images, "batch_size": 32, "dtype": self.dtype}

    @cached_property
    def scoring(self) -> dict[str, Any]:
        """The settings that determine how a model is scored."""
        return {
            "model": self.model_fingerprint,
            "test": self.test_fingerprint,
            "max_images": self.max_images,
            "dtype": self.dtype,
            "versions": versions(),
        }

    def cell(self, method: Method, bits: int) -> Cell:
        """Resolve everything about one row. Raises RecipeError."""
        if method.peer is not None:
            raise RecipeError(f"Method {method.label}: peers compress only language models.")
        recipe = method.resolve(
            bits, {"calibration": self.calibration, "samples": self.samples, "seed": self.seed, "dtype": self.dtype}
        )
        settings = {
            "model": self.model_fingerprint,
            "peer": None,
            "recipe": recipe_settings(recipe),
            "calibration": None if recipe.calibration == "none" else self.calibration_fingerprint,
            "versions": versions(),
        }
        return Cell(method, bits, recipe, settings, {"artifact": settings, "scoring": self.scoring})
