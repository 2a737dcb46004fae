"""The conditions that all rows of a table share, and the settings that name a row."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from pydantic import BaseModel

from experiments.quality.later import LATER
from experiments.quality.methods import Method
from experiments.quality.rows import Original, OriginalOf, Row, RowOf, TestScore, file_name
from shiftadd_cli.data.mixture import KINDS, parse_mixture
from shiftadd_cli.data.text import TextData, load_text
from shiftadd_cli.errors import CalibrationError, RecipeError
from shiftadd_cli.evaluation.compare import DEFAULT_CONTEXT
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.self_text.write import written_by_model
from shiftadd_cli.source import open_source
from shiftadd_cli.source.positions import position_limit, window_length
from shiftadd_cli.version import __version__

_LIBRARIES = ("torch", "transformers")

S_co = TypeVar("S_co", bound=BaseModel, covariant=True)


@dataclass(frozen=True)
class Cell:
    """One method at one bit width: the recipe to run, and the settings that determine its artifact and its row.

    bits: its bit width in the table; the planes of every layer, unless the method gives layers bits of their own.
    """

    method: Method
    bits: int
    recipe: Recipe
    artifact_settings: dict[str, Any]
    row_settings: dict[str, Any]

    @property
    def artifact_name(self) -> str:
        return file_name(self.method.label, self.bits, self.artifact_settings)

    @property
    def row_name(self) -> str:
        return file_name(self.method.label, self.bits, self.row_settings) + ".json"


class TableConditions(Protocol[S_co]):
    """The conditions that a table needs.

    model: as typed; tests: by a short name; scoring: the settings that determine how a model is scored;
    evaluation_options: for `evaluate`, in addition to models and test; score_kind, original_kind, row_kind: types of
    the rows on disk.
    """

    @property
    def model(self) -> str: ...

    @property
    def score_kind(self) -> type[S_co]: ...

    @property
    def original_kind(self) -> type[OriginalOf[S_co]]: ...

    @property
    def row_kind(self) -> type[RowOf[S_co]]: ...

    @property
    def tests(self) -> dict[str, str]: ...

    @property
    def scoring(self) -> dict[str, Any]: ...

    @property
    def evaluation_options(self) -> dict[str, Any]: ...


@dataclass
class Conditions:
    """The model and the texts of a table.

    model, calibration, tests, context: as typed; `tests` maps a short name to each, and `window` is the context in use.
    dtype: of the computation, see `evaluate`.
    """

    score_kind: ClassVar[type[TestScore]] = TestScore
    original_kind: ClassVar[type[Original]] = Original
    row_kind: ClassVar[type[Row]] = Row

    model: str
    calibration: str
    samples: int
    seq_len: int
    seed: int
    tests: dict[str, str]
    context: int | None
    max_tokens: int | None
    dtype: str
    _texts: dict[tuple[str, str], TextData] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._source = open_source(self.model)
        self.model_fingerprint = self._source.fingerprint
        limits = {self.model: position_limit(self._source.config)}
        self.window = window_length(self.context, DEFAULT_CONTEXT, limits, "--context")

    @property
    def evaluation_options(self) -> dict[str, Any]:
        return {"context": self.window, "max_tokens": self.max_tokens, "dtype": self.dtype}

    @cached_property
    def scoring(self) -> dict[str, Any]:
        """The settings that determine how a model is scored."""
        return {
            "model": self.model_fingerprint,
            "tests": {name: self._text(spec, "test").fingerprint for name, spec in self.tests.items()},
            "context": self.window,
            "max_tokens": self.max_tokens,
            "dtype": self.dtype,
            "versions": versions(),
        }

    def cell(self, method: Method, bits: int) -> Cell:
        """Resolve everything about one row.

        Raises RecipeError or CalibrationError, also if a method would be calibrated on a test text.
        """
        common = {
            "calibration": self.calibration,
            "samples": self.samples,
            "seq_len": self.seq_len,
            "seed": self.seed,
        }
        recipe = method.resolve(bits, common)
        reads = recipe.calibration != "none" and (method.peer is None or method.peer.calibrated)
        texts = self._calibration_texts(recipe.calibration) if reads else {}
        for name, fingerprint in self.scoring["tests"].items():
            if fingerprint in texts:
                raise CalibrationError(f"{name} is the calibration text of {method.label} and a test; give another.")
        packages = (method.peer.package,) if method.peer else ()
        settings = {
            "model": self.model_fingerprint,
            "peer": method.peer.name if method.peer else None,
            "recipe": recipe_settings(recipe),
            # A single text is named by its fingerprint alone, as before there were mixtures.
            "calibration": next(iter(texts), None) if len(texts) < 2 else texts,
            "versions": versions(*packages),
        }
        return Cell(method, bits, recipe, settings, {"artifact": settings, "scoring": self.scoring})

    def _calibration_texts(self, calibration: str) -> dict[str, float]:
        """Shares of the windows by text fingerprint, or by name for text that the model writes."""
        return {
            part.spec if part.spec in KINDS else self._text(part.spec, "calibration").fingerprint: part.share
            for part in parse_mixture(calibration)
        }

    def _text(self, spec: str, split: Literal["calibration", "test"]) -> TextData:
        key = (spec, split)
        if key not in self._texts:
            self._texts[key] = load_text(spec, split=split, tokenizer=self._source.load_tokenizer())
        return self._texts[key]


def name_tests(specs: tuple[str, ...]) -> dict[str, str]:
    """A short name for each test text: its file name without the extension. Raises RecipeError for duplicates."""
    names = {Path(spec).stem: spec for spec in specs}
    if len(names) < len(specs):
        raise RecipeError("Two test texts have the same name; give each once, and files of different names.")
    return names


def recipe_settings(recipe: Recipe) -> dict[str, Any]:
    """The fields that determine an artifact. The calibration text counts by its content, not by its file name."""
    written = written_by_model(recipe)
    unused = {"calibration", *(() if written else ("writing_length", "writing_temperature", "writing_min_p"))}
    fields = recipe.model_dump(mode="json", exclude=unused)
    # Rows keep their names: recipes with bits for each layer once had 3 here.
    fields["bits"] = recipe.bits or 3
    return {name: value for name, value in fields.items() if name not in LATER or value != LATER[name]}


def versions(*packages: str) -> dict[str, str]:
    """Versions of the packages that can change a number: ours, the underlying libraries, and `packages`."""
    return {"shiftadd-cli": __version__} | {name: _version(name) for name in (*_LIBRARIES, *packages)}


@cache
def _version(package: str) -> str:
    """Cached, because tables need it thousands of times and a look-up takes a millisecond."""
    return importlib.metadata.version(package)


def machine() -> dict[str, str]:
    """The machine, for the notes below a table."""
    return {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
    }


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
