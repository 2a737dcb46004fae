"""plan.json: how many bits each layer gets, and what that was decided on. One layer a line, so that two plans can be
compared line by line.

    {"format": "shiftadd bit plan", "version": 1,
     "model": {"name": "demo", "fingerprint": "..."},
     "storage": {"group_size": 128, "group_rows": 1, "scale_format": "apot2", ...},
     "made_by": {"sensitivity": "output", "recipe_fingerprint": "...", "calibration": {...}, "budget": "...", ...},
     "layers": {"model.layers.0.self_attn.q_proj": {"bits": 3, "shape": [576, 576], "bytes": {"2": 98496, ...},
                                                    "cost": {"2": 0.0123, ...}}, ...}}

`bytes` are what is stored for the layer and `cost` the loss predicted, for every number of bits that was allowed. Bits
may be changed by hand to any of these. Shift layers have a word, such as `shift2-4`, in place of a number; a plan of
layers that may be such has version 2.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from shiftadd_cli.bcq.choices import Choice, bits_of_choice, ordered_choices, parse_choice
from shiftadd_cli.bcq.matrix_format import MatrixStorage
from shiftadd_cli.errors import AllocationError, first_fault
from shiftadd_cli.recipe_file import word
from shiftadd_cli.source import LinearSpec
from shiftadd_cli.storage.file_part import FilePart

PLAN_FORMAT: Final = "shiftadd bit plan"
# What is read; what is written is the least that a plan needs.
PLAN_VERSION: Final = 2
# A layer takes some 300 bytes: room for a hundred thousand of them.
MAX_BYTES = 50_000_000

# Numbers of planes are keys of JSON objects too, and so text.
Kind = Annotated[Choice, BeforeValidator(parse_choice)]


class _Part(FilePart):
    model_config = ConfigDict(allow_inf_nan=False)


class PlannedModel(_Part):
    """The model the plan is for."""

    name: str
    fingerprint: str


class PlanCalibration(_Part):
    """The data that sensitivities were measured on: `samples` windows of `seq_len` tokens, or images (None), and the
    special tokens that windows begin with ("" for none, None for images)."""

    name: str
    fingerprint: str
    samples: int
    seq_len: int | None
    window_start: str | None = None

    @property
    def amount(self) -> str:
        """How much of it, in words."""
        if self.seq_len is None:
            return f"{self.samples} images"
        start = f", windows begin with {self.window_start}" if self.window_start else ""
        return f"{self.samples} x {self.seq_len} tokens{start}"


class Origin(_Part):
    """What the plan was decided on. `recipe_fingerprint` leaves out what cannot change a sensitivity, bits first."""

    sensitivity: str
    recipe_fingerprint: str
    calibration: PlanCalibration
    budget: str
    keep: tuple[str, ...]
    tie: tuple[str, ...]
    tie_fused: bool


class PlannedLayer(_Part):
    """What one layer is, and its stored bytes and predicted loss as each of what was allowed."""

    bits: Kind
    shape: tuple[int, int]
    bytes: dict[Kind, int]
    cost: dict[Kind, float]

    @model_validator(mode="after")
    def _bits_are_known(self) -> PlannedLayer:
        if self.bytes.keys() != self.cost.keys():
            raise ValueError("bytes and cost must be of the same numbers of bits")
        if self.bits not in self.bytes:
            raise ValueError(
                f"bits is {self.bits}, which is none of {', '.join(map(str, ordered_choices(self.bytes)))}"
            )
        return self

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]


class BitPlan(_Part):
    """Bits for every layer of one model."""

    format: Literal["shiftadd bit plan"] = PLAN_FORMAT
    version: Literal[1, 2] = 1
    model: PlannedModel
    storage: MatrixStorage
    made_by: Origin
    layers: Annotated[dict[str, PlannedLayer], Field(min_length=1)]

    @model_validator(mode="after")
    def _version_knows_primitives(self) -> BitPlan:
        if self.version < plan_version(self.layers.values()):
            raise ValueError(f"shift layers need version {PLAN_VERSION}, and this is version {self.version}")
        return self

    @property
    def bits(self) -> dict[str, Choice]:
        """Bits, or the word of a shift primitive, by name of the layer."""
        return {name: layer.bits for name, layer in self.layers.items()}

    @property
    def stored_bytes(self) -> int:
        return sum(layer.bytes[layer.bits] for layer in self.layers.values())

    @property
    def weights(self) -> int:
        return sum(layer.weights for layer in self.layers.values())

    @property
    def bits_per_weight(self) -> float:
        """Everything stored for the layers, over their weights."""
        return 8 * self.stored_bytes / self.weights

    @property
    def planes_per_weight(self) -> float:
        """Bits of codes, averaged over weights."""
        return sum(bits_of_choice(layer.bits) * layer.weights for layer in self.layers.values()) / self.weights

    @property
    def predicted_loss(self) -> float:
        """Sum of the layers' costs, in the unit of the sensitivity; rounded once, as where it was chosen."""
        return math.fsum(layer.cost[layer.bits] for layer in self.layers.values())

    def fingerprint(self) -> str:
        """SHA-256, in hex, of the plan's text."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """The text of plan.json: layers in the order of their names, with numbers in names compared as numbers."""
        whole = self.model_dump(mode="json")
        layers = whole.pop("layers")
        head = json.dumps(whole, indent=2, ensure_ascii=False).removesuffix("\n}")
        lines = [
            f"    {json.dumps(name, ensure_ascii=False)}: {json.dumps(_readable(layers[name]))}"
            for name in sorted(layers, key=_natural)
        ]
        return head + ',\n  "layers": {\n' + ",\n".join(lines) + "\n  }\n}\n"

    def check(self, origin: str, fingerprint: str, storage: MatrixStorage, linears: Sequence[LinearSpec]) -> None:
        """Refuse to be used for another model or another way to store it than it was made for.

        origin: name of the plan in errors; fingerprint: of the source; storage: of the run; linears: those to quantize.
        Raises AllocationError with the first thing that does not fit.
        """
        if fingerprint != self.model.fingerprint:
            raise AllocationError(
                f"Bit plan {origin} was made for another model ({self.model.name}); make one for this model with "
                "shiftadd allocate-bits."
            )
        for name in MatrixStorage.model_fields:
            if getattr(storage, name) != getattr(self.storage, name):
                raise AllocationError(
                    f"Bit plan {origin} was made for {name} = {word(getattr(self.storage, name))}, and the recipe "
                    f"says {word(getattr(storage, name))}, so its sizes would not be true; change the recipe's "
                    f"{name}, or make another plan."
                )
        for spec in linears:
            layer = self.layers.get(spec.name)
            if layer is None:
                raise AllocationError(
                    f"Bit plan {origin} says nothing of {spec.name}; make a plan with the `skip` of this run."
                )
            if layer.shape != (spec.out_features, spec.in_features):
                raise AllocationError(
                    f"Bit plan {origin} gives {spec.name} the shape {layer.shape[0]} x {layer.shape[1]}, and the model "
                    f"has {spec.out_features} x {spec.in_features}; make another plan."
                )
        if left := self.layers.keys() - {spec.name for spec in linears}:
            raise AllocationError(
                f"Bit plan {origin} has bits for {min(left)}, which this run leaves as it is; make a plan with the "
                "`skip` of this run."
            )


def load_plan(path: Path) -> BitPlan:
    """Read plan.json. Raises AllocationError in one sentence where it cannot be read or is no plan of this version."""
    again = "make it again with shiftadd allocate-bits"
    if not path.is_file():
        raise AllocationError(f"There is no bit plan {path}; {again.replace('it again', 'one')}.")
    if path.stat().st_size > MAX_BYTES:
        raise AllocationError(f"Bit plan {path} has more than {MAX_BYTES:,} bytes, which no plan has; {again}.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except (UnicodeDecodeError, ValueError, RecursionError) as failure:
        reason = " ".join(str(failure).split())
        raise AllocationError(f"Bit plan {path} is not valid JSON ({reason}); mend it, or {again}.") from None
    if not isinstance(values, dict) or values.get("format") != PLAN_FORMAT:
        raise AllocationError(f"{path} is no bit plan; {again.replace('it again', 'one')}.")
    version = values.get("version")
    if type(version) is not int or not 1 <= version <= PLAN_VERSION:
        raise AllocationError(
            f"Bit plan {path} has version {version!r}, and this shiftadd reads up to {PLAN_VERSION}; {again}."
        )
    try:
        return BitPlan.model_validate(values)
    except ValidationError as failure:
        place, message = first_fault(failure)
        raise AllocationError(f"Bit plan {path}, {' '.join(place)}: {message}; mend it, or {again}.") from None


def plan_version(layers: Iterable[PlannedLayer]) -> Literal[1, 2]:
    """The least version of a plan of these layers."""
    shifts = any(isinstance(choice, str) for layer in layers for choice in layer.bytes)
    return 2 if shifts else 1


def round_cost(cost: float) -> float:
    """To the six digits that the file has, which is more than any cost is known to."""
    return float(f"{cost:.6g}")


def _no_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} is given twice")
        found[key] = value
    return found


_Value = TypeVar("_Value")


def _readable(layer: Mapping[str, Any]) -> dict[str, Any]:
    """A layer with the candidates in order and costs as they are written."""
    return {
        **layer,
        "bytes": _by_bits(layer["bytes"]),
        "cost": {bits: round_cost(cost) for bits, cost in _by_bits(layer["cost"]).items()},
    }


def _by_bits(values: Mapping[str, _Value]) -> dict[str, _Value]:
    return {str(choice): values[str(choice)] for choice in ordered_choices(map(parse_choice, values))}


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
