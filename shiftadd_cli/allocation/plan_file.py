"""plan.json: the bits of each layer, and the inputs of that decision. It has one layer per line, so that two plans can
be compared line by line.

    {"format": "shiftadd bit plan", "version": 1,
     "model": {"name": "demo", "fingerprint": "..."},
     "storage": {"group_size": 128, "group_rows": 1, "scale_format": "apot2", ...},
     "made_by": {"sensitivity": "output", "recipe_fingerprint": "...", "calibration": {...}, "budget": "...", ...},
     "layers": {"model.layers.0.self_attn.q_proj": {"bits": 3, "shape": [576, 576], "bytes": {"2": 98496, ...},
                                                    "cost": {"2": 0.0123, ...}}, ...},
     "tables": {"model.embed_tokens": {"bits": "trellis1-4", "shape": [49152, 576], "bytes": {...}, "cost": {...}}}}

`bytes` has the stored bytes of the layer and `cost` its predicted loss, for every allowed number of bits. `bits` may be
edited by hand to any of these. Shift layers and trellis-coded planes have a word, such as `shift2-4` or `trellis1-2`,
in place of a number. `tables` has the same for embeddings and heads, where 8 stands for 8-bit rows; it is absent if
their form is not chosen. A plan that allows shift layers has version 2, one that allows trellis-coded planes version 3,
and one with tables version 4.
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

from shiftadd_cli.bcq.choices import Choice, bits_of_choice, ordered_choices, parse_choice, parts_of_choice
from shiftadd_cli.bcq.matrix_format import MatrixStorage
from shiftadd_cli.bcq.primitives import PRIMITIVES
from shiftadd_cli.errors import AllocationError, first_fault
from shiftadd_cli.recipe_file import word
from shiftadd_cli.source import LinearSpec
from shiftadd_cli.storage.file_part import FilePart

PLAN_FORMAT: Final = "shiftadd bit plan"
# The newest readable version; plans are written with the lowest version they need.
PLAN_VERSION: Final = 4
# A layer takes about 300 bytes, so this is room for a hundred thousand layers.
MAX_BYTES = 50_000_000

# Numbers of planes are also keys of JSON objects, and therefore strings.
Kind = Annotated[Choice, BeforeValidator(parse_choice)]


class _Part(FilePart):
    model_config = ConfigDict(allow_inf_nan=False)


class PlannedModel(_Part):
    """The model the plan is for."""

    name: str
    fingerprint: str


class PlanCalibration(_Part):
    """The data used to measure sensitivities: `samples` windows of `seq_len` tokens (None for images), and the special
    tokens at the start of each window ("" for none, None for images)."""

    name: str
    fingerprint: str
    samples: int
    seq_len: int | None
    window_start: str | None = None

    @property
    def amount(self) -> str:
        """The amount of data, in words."""
        if self.seq_len is None:
            return f"{self.samples} images"
        start = f", windows begin with {self.window_start}" if self.window_start else ""
        return f"{self.samples} x {self.seq_len} tokens{start}"


class Origin(_Part):
    """The inputs of the plan. `recipe_fingerprint` omits fields that cannot change a sensitivity, such as bits."""

    sensitivity: str
    recipe_fingerprint: str
    calibration: PlanCalibration
    budget: str
    keep: tuple[str, ...]
    tie: tuple[str, ...]
    tie_fused: bool


class PlannedLayer(_Part):
    """The bits and shape of one layer, and its stored bytes and predicted loss for each allowed choice."""

    bits: Kind
    shape: tuple[int, int]
    bytes: dict[Kind, int]
    cost: dict[Kind, float]

    @model_validator(mode="after")
    def _bits_are_known(self) -> PlannedLayer:
        if self.bytes.keys() != self.cost.keys():
            raise ValueError("bytes and cost must have the same numbers of bits")
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
    version: Literal[1, 2, 3, 4] = 1
    model: PlannedModel
    storage: MatrixStorage
    made_by: Origin
    layers: Annotated[dict[str, PlannedLayer], Field(min_length=1)]
    tables: dict[str, PlannedLayer] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _version_knows_primitives(self) -> BitPlan:
        if self.version < (needed := plan_version(self.layers.values(), tables=bool(self.tables))):
            raise ValueError(f"its layers need version {needed}, but this is version {self.version}")
        return self

    @property
    def bits(self) -> dict[str, Choice]:
        """Bits, or the word of another primitive, by layer name."""
        return {name: layer.bits for name, layer in self.layers.items()}

    @property
    def choices(self) -> dict[str, Choice]:
        """`bits`, and the forms of tables by name."""
        return self.bits | {name: table.bits for name, table in self.tables.items()}

    @property
    def stored_bytes(self) -> int:
        return sum(layer.bytes[layer.bits] for layer in self.layers.values())

    @property
    def weights(self) -> int:
        return sum(layer.weights for layer in self.layers.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the layers, including all overhead."""
        return 8 * self.stored_bytes / self.weights

    @property
    def planes_per_weight(self) -> float:
        """Bits of the codes, averaged over weights."""
        return sum(bits_of_choice(layer.bits) * layer.weights for layer in self.layers.values()) / self.weights

    @property
    def predicted_loss(self) -> float:
        """Sum of the layers' costs, in the unit of the sensitivity; rounded once, as in the solver."""
        return math.fsum(layer.cost[layer.bits] for layer in self.layers.values())

    def fingerprint(self) -> str:
        """SHA-256, in hex, of the plan's text."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """The text of plan.json: layers sorted by name, with numbers in names compared as numbers."""
        values = self.model_dump(mode="json")
        parts = {key: values.pop(key) for key in ("layers", "tables")}
        text = json.dumps(values, indent=2, ensure_ascii=False).removesuffix("\n}")
        for key, layers in parts.items():
            lines = [
                f"    {json.dumps(name, ensure_ascii=False)}: {json.dumps(_readable(layers[name]))}"
                for name in sorted(layers, key=_natural)
            ]
            if lines:
                text += f',\n  "{key}": {{\n' + ",\n".join(lines) + "\n  }"
        return text + "\n}\n"

    def check(
        self,
        origin: str,
        fingerprint: str,
        storage: MatrixStorage,
        linears: Sequence[LinearSpec],
        tables: Mapping[str, tuple[int, int]],
    ) -> None:
        """Check that the plan was made for this model and this storage format.

        origin: name of the plan in errors; fingerprint: of the source; storage: of the run; linears: those to quantize;
        tables: rows and columns of those whose form is open, by name.
        Raises AllocationError for the first mismatch.
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
                    f"says {word(getattr(storage, name))}, so its sizes would be wrong; change the recipe's "
                    f"{name}, or make another plan."
                )
        for spec in linears:
            layer = self.layers.get(spec.name)
            if layer is None:
                raise AllocationError(
                    f"Bit plan {origin} has no entry for {spec.name}; make a plan with the `skip` of this run."
                )
            if layer.shape != (spec.out_features, spec.in_features):
                raise AllocationError(
                    f"Bit plan {origin} gives {spec.name} the shape {layer.shape[0]} x {layer.shape[1]}, but the model "
                    f"has {spec.out_features} x {spec.in_features}; make another plan."
                )
        if extra := self.layers.keys() - {spec.name for spec in linears}:
            raise AllocationError(
                f"Bit plan {origin} has bits for {min(extra)}, which this run leaves unquantized; make a plan with the "
                "`skip` of this run."
            )
        self._check_tables(origin, tables)

    def _check_tables(self, origin: str, tables: Mapping[str, tuple[int, int]]) -> None:
        for name, table in self.tables.items():
            if name not in tables:
                raise AllocationError(
                    f"Bit plan {origin} sets the form of {name}, which is not open in this run; give "
                    "`embedding_bits=auto` and the `skip` of the plan, or make a plan with this run's `embedding_bits`."
                )
            if table.shape != tables[name]:
                raise AllocationError(
                    f"Bit plan {origin} gives {name} the shape {table.shape[0]} x {table.shape[1]}, but the model has "
                    f"{tables[name][0]} x {tables[name][1]}; make another plan."
                )


def load_plan(path: Path) -> BitPlan:
    """Read plan.json. Raises AllocationError with one sentence if it is unreadable or not a plan of a known version."""
    again = "make it again with shiftadd allocate-bits"
    if not path.is_file():
        raise AllocationError(f"There is no bit plan {path}; {again.replace('it again', 'one')}.")
    if path.stat().st_size > MAX_BYTES:
        raise AllocationError(f"Bit plan {path} has more than {MAX_BYTES:,} bytes, too many for a plan; {again}.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except (UnicodeDecodeError, ValueError, RecursionError) as failure:
        reason = " ".join(str(failure).split())
        raise AllocationError(f"Bit plan {path} is not valid JSON ({reason}); fix it, or {again}.") from None
    if not isinstance(values, dict) or values.get("format") != PLAN_FORMAT:
        raise AllocationError(f"{path} is not a bit plan; {again.replace('it again', 'one')}.")
    version = values.get("version")
    if type(version) is not int or not 1 <= version <= PLAN_VERSION:
        raise AllocationError(
            f"Bit plan {path} has version {version!r}, but this shiftadd reads at most {PLAN_VERSION}; {again}."
        )
    try:
        return BitPlan.model_validate(values)
    except ValidationError as failure:
        location, message = first_fault(failure)
        raise AllocationError(f"Bit plan {path}, {' '.join(location)}: {message}; fix it, or {again}.") from None


def plan_version(layers: Iterable[PlannedLayer], *, tables: bool) -> Literal[1, 2, 3, 4]:
    """The lowest version that a plan of these layers, with or without tables, needs."""
    if tables:
        return 4
    primitives = {parts_of_choice(choice)[0] for layer in layers for choice in layer.bytes}
    return max((PRIMITIVES[name].plan_version for name in primitives), default=1)


def round_cost(cost: float) -> float:
    """Round to the six digits written to the file, which is more than the precision of any cost."""
    return float(f"{cost:.6g}")


def _no_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"{key!r} is given twice")
        result[key] = value
    return result


_Value = TypeVar("_Value")


def _readable(layer: Mapping[str, Any]) -> dict[str, Any]:
    """A layer with its candidates in order and its costs rounded for writing."""
    return {
        **layer,
        "bytes": _by_bits(layer["bytes"]),
        "cost": {bits: round_cost(cost) for bits, cost in _by_bits(layer["cost"]).items()},
    }


def _by_bits(values: Mapping[str, _Value]) -> dict[str, _Value]:
    return {str(choice): values[str(choice)] for choice in ordered_choices(map(parse_choice, values))}


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
