"""The one options object: everything that decides what a run of `shiftadd quantize` computes.

A recipe comes from a packaged name (`default`, `fast`, ...) or a YAML file, with options of the command line on top.
Every field is an option of `quantize` and every option of `quantize` that shapes the result is a field here.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from shiftadd_cli.bcq.choices import CODE_BITS, PLANES, Choice, Primitive, choice_of, ordered_choices, parse_choice
from shiftadd_cli.bcq.matrix_format import MatrixStorage, OptionFields
from shiftadd_cli.bcq.options import FitOptions, SolverOptions
from shiftadd_cli.errors import RecipeError
from shiftadd_cli.recipe_file import configs_folder, packaged_names, read_mapping, short

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

NO_CALIBRATION = "none"
# The fields that say how many bits layers get.
BITS = ("bits", "avg_bits", "bit_plan")
_STAND_IN_BITS = 3

_SIZE = re.compile(r"([1-9][0-9]{0,8})(KB|MB|GB)")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


class BitOptions(OptionFields):
    """What layers are made of: one of `bits`, `avg_bits` and `bit_plan` says it, and the others are None."""

    primitive: Annotated[
        Primitive,
        Field(
            description="What weights are made of: 'bcq', binary planes times scales; 'shift1', a signed power of two, "
            "or 'shift2', a signed sum of two, times the scale of the row."
        ),
    ]
    bits: Annotated[
        int | None,
        Field(
            ge=1,
            le=8,
            description="Binary planes per weight, 1 to 8; with --primitive shift1 (2 to 4) or shift2 (2 to 5) the "
            "bits of a weight's code.",
        ),
    ] = None
    avg_bits: Annotated[
        float | None,
        Field(
            gt=0,
            description="Upper limit of the stored bits per weight of the quantized layers (planes, scales, everything "
            "counted). Measures how much every layer matters and gives each its own bits, in place of --bits.",
        ),
    ] = None
    candidates: Annotated[
        tuple[Choice, ...],
        Field(
            strict=False,
            description="What a layer may get where layers get bits of their own: numbers of planes, and shift1 and "
            "shift2 (shift1-2 to shift1-4 and shift2-2 to shift2-5 say the bits of the code, else 3 and 4).",
        ),
    ]
    tie_fused: Annotated[
        bool,
        Field(
            description="Equal bits and primitives for layers that inference engines fuse (query, key and value; gate "
            "and up), where layers get bits of their own."
        ),
    ]
    bit_plan: Annotated[
        str | None,
        Field(
            min_length=1,
            description="File written by `shiftadd allocate-bits`, which gives every layer bits of its own in place "
            "of --bits.",
        ),
    ] = None

    @field_validator("candidates", mode="before")
    @classmethod
    def _choices(cls, value: object) -> object:
        if not isinstance(value, (list, tuple)) or not value:
            raise ValueError("must be a list of numbers of planes and shifts, such as [2, 3, 4] or [2, 3, shift2]")
        return ordered_choices(parse_choice(choice) for choice in value)

    @model_validator(mode="after")
    def _one_way(self) -> BitOptions:
        ways = [name for name in BITS if getattr(self, name) is not None]
        if not ways:
            raise ValueError("nothing says how many bits layers get; give bits, avg_bits or bit_plan")
        if len(ways) > 1:
            raise ValueError(f"{' and '.join(ways)} both say how many bits each layer gets; give one of them")
        if self.primitive != PLANES and self.bits is None:
            raise ValueError(
                f"primitive {self.primitive} is for all layers, and {ways[0]} gives each its own; give bits in place "
                f"of {ways[0]}, or set primitive to {PLANES} and name shifts among the candidates"
            )
        widths = CODE_BITS[self.primitive]
        if self.bits is not None and self.bits not in widths:
            raise ValueError(
                f"a code of {self.primitive} has {widths[0]} to {widths[-1]} bits and not {self.bits}; set bits to one "
                "of these"
            )
        return self

    @property
    def choice(self) -> Choice:
        """What every layer is stored as; it stands in for choices that are not made yet."""
        return choice_of(self.primitive, _STAND_IN_BITS if self.bits is None else self.bits)


class Recipe(FitOptions, MatrixStorage, BitOptions):
    """Options of a run. Field descriptions are the help texts of the command line.

    There are no defaults here: `Recipe.load` takes missing fields from the recipe `default`. It raises RecipeError with
    one sentence, where the constructor raises pydantic's ValidationError. `model_fields_set` has the fields that the
    user gave, in a file of their own, as options or as arguments, but not those of a packaged recipe.
    """

    bias_correction: Annotated[
        bool,
        Field(
            description="Let the bias of a linear that has one take over the mean of its error, so that its planes "
            "need only fit inputs about their mean."
        ),
    ]
    true_sequential: Annotated[
        bool,
        Field(
            description="Calibrate the linears of a block in the order they run, each on what the quantized ones "
            "before it give."
        ),
    ]
    loss_aware: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Power of the squared gradient of the model's loss by which a token counts at each linear: 0 "
            "all alike, 1 as GuidedQuant. Costs one pass forwards and backwards through the model.",
        ),
    ]
    reconstruct_epochs: Annotated[
        int,
        Field(
            ge=0,
            description="Passes over the calibration text in which each block is tuned by gradient towards its "
            "original output: codes, scales, offsets, norms and biases. 0: not at all.",
        ),
    ]
    distill_epochs: Annotated[
        int,
        Field(
            ge=0,
            description="Passes over the calibration text in which, at the end, row scales, norms and biases of the "
            "whole model are tuned by gradient towards what the original predicts. 0: not at all.",
        ),
    ]
    calibration: Annotated[
        str,
        Field(
            min_length=1,
            description="Calibration text: 'self' (documents and conversations that the model writes; 'self-plain' and "
            "'self-chat' are one of them), 'builtin' (documentation of Python), wikitext2, c4, ptb, a .txt, .jsonl or "
            ".parquet file (field or column 'text', or 'messages' of conversations), a mixture of these such as "
            "self:0.8,notes.txt:0.2, or 'none' for a run without data. For vision models images: 'self' (those of the "
            "next two that suit the model), 'noise' (scenes of random shapes), 'builtin' (digits of scikit-learn), a "
            "folder, a .parquet file, or a data set of the hub as NAME or NAME:SPLIT.",
        ),
    ]
    writing_length: Annotated[
        int,
        Field(
            ge=2,
            description="Tokens that a model writes at a stretch of its own calibration text; longer windows are put "
            "together of several pieces.",
        ),
    ]
    writing_temperature: Annotated[
        float,
        Field(gt=0, description="Temperature at which a model writes its own calibration text."),
    ]
    writing_min_p: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="Where a model writes its own calibration text: the least probability of a token that may be "
            "drawn, as a share of that of the likeliest.",
        ),
    ]
    samples: Annotated[int, Field(ge=1, description="Calibration windows, or images.")]
    seq_len: Annotated[
        int,
        Field(
            ge=2,
            description="Tokens per calibration window of a text; where this is not given, no more than the model has "
            "positions for.",
        ),
    ]
    batch_size: Annotated[
        int, Field(ge=1, description="Calibration windows, or images, run at once; more needs more memory.")
    ]
    embedding_bits: Annotated[
        Literal[8, 16],
        Field(
            description="Input embedding and output head, or patch embedding: 8 stores them as 8-bit rows with one "
            "scale each, 16 leaves them as they are."
        ),
    ]
    skip: Annotated[
        tuple[str, ...],
        Field(strict=False, description="Pattern of linear layers to leave as they are; may be given several times."),
    ]
    allow_partial: Annotated[
        bool, Field(description="Compress a model even if less than half of its weights are in layers that can be.")
    ]
    device: Annotated[str, Field(min_length=1, description="Where to compute: 'auto', 'cpu', 'cuda', 'cuda:1', ...")]
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Field(
            description="Type of what stays unquantized, and that is computed in where the processor has instructions "
            "for it (else in float32); 'auto' keeps the model's own."
        ),
    ]
    shard_size: Annotated[str, Field(description="Largest weight file to write, in KB, MB or GB.")]

    @field_validator("skip")
    @classmethod
    def _no_empty_pattern(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(not pattern.strip() for pattern in value):
            raise ValueError("must not hold an empty pattern")
        return value

    @field_validator("shard_size")
    @classmethod
    def _readable_size(cls, value: str) -> str:
        if not _SIZE.fullmatch(value):
            raise ValueError("must be a whole number above 0 followed by KB, MB or GB, such as 2GB")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if self.group_rows != 1:
            wrong = [
                text
                for text, on in (
                    ("refine_rounds to 0", self.refine_rounds > 0),
                    ("row_scale to false", self.row_scale),
                )
                if on
            ]
            if wrong:
                raise ValueError(
                    f"rows that share scales (group_rows {self.group_rows}) cannot be refined or scaled one by one; "
                    f"set {' and '.join(wrong)}, or group_rows to 1"
                )
        if self.reconstruct_epochs and self.group_rows != 1:
            raise ValueError("reconstruct_epochs needs groups that lie in rows; set group_rows to 1, or it to 0")
        if (self.reconstruct_epochs or self.distill_epochs) and self.samples <= self.batch_size:
            name = "reconstruct_epochs" if self.reconstruct_epochs else "distill_epochs"
            raise ValueError(
                f"{name} holds back one batch of windows at least; set samples above batch_size ({self.batch_size})"
            )
        if self.calibration == NO_CALIBRATION:
            wrong = [
                text
                for text, on in (
                    ("bits in place of avg_bits", self.avg_bits is not None),
                    ("sweep to none", self.sweep != "none"),
                    ("refine_rounds to 0", self.refine_rounds > 0),
                    ("reconstruct_epochs to 0", self.reconstruct_epochs > 0),
                    ("distill_epochs to 0", self.distill_epochs > 0),
                    ("loss_aware to 0", self.loss_aware > 0),
                )
                if on
            ]
            if wrong:
                raise ValueError(
                    f"without calibration text there is nothing to measure, compensate or refine against; "
                    f"set {' and '.join(wrong)} (as the recipe 'fast' does), or choose a calibration text"
                )
        return self

    @property
    def solver_options(self) -> SolverOptions:
        """The part of the recipe that the solver needs, for matrices of the choice that all layers have."""
        fields = {name: getattr(self, name) for name in FitOptions.model_fields}
        return SolverOptions(format=self.at(self.choice), **fields)

    @property
    def follows_original(self) -> bool:
        """Whether a run needs the hidden states of the original model beside those of the compressed one."""
        return bool(self.asymmetric or self.reconstruct_epochs or self.distill_epochs)

    @property
    def shard_bytes(self) -> int:
        """`shard_size` in bytes; the units are decimal."""
        match = _SIZE.fullmatch(self.shard_size)
        assert match is not None, "validated on construction"
        return int(match[1]) * _UNITS[match[2]]

    def fingerprint(self, without: Iterable[str] = ()) -> str:
        """SHA-256, in hex, of the recipe as JSON with sorted keys: equal exactly when all fields are.

        without: fields that shall not matter.
        """
        fields = self.model_dump(mode="json", exclude=set(without))
        canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @classmethod
    def load(cls, name_or_path: str = "default", overrides: dict[str, Any] | None = None) -> Recipe:
        """The packaged recipe of that name, or else the YAML file of that path, with `overrides` (field: value) on top.

        Fields that a file leaves out are those of `default`. A packaged name wins over a file of the same name; write
        `./default` to mean the file.

        Raises RecipeError, naming the file or option, the field and the fault.
        """
        packaged = name_or_path in packaged_names()
        path = configs_folder() / f"{name_or_path}.yaml" if packaged else Path(name_or_path)
        if not packaged and not path.exists():
            raise RecipeError(_no_such_recipe(name_or_path))
        fields = read_mapping(path)
        usual = read_mapping(configs_folder() / "default.yaml")
        return _build(_on_top(usual, fields), overrides or {}, f"Recipe {path}", given=() if packaged else fields)

    def changed(self, fields: dict[str, Any]) -> Recipe:
        """This recipe with other values of some fields, as `load` puts `overrides` on top of a file's."""
        return _build(self.model_dump(), fields, "The recipe", given=self.model_fields_set)


def nearest_recipe(fields: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The packaged recipe that differs least from a recipe as JSON, `default` before others that are as near, and the
    fields to put on top."""
    differences = {}
    for name in ("default", *packaged_names()):
        usual = Recipe.load(name).model_dump(mode="json")
        on_top = {key: value for key, value in fields.items() if value != usual.get(key)}
        # A field that is set takes the place of the others.
        differences[name] = {key: value for key, value in on_top.items() if key not in BITS or value is not None}
    return min(differences.items(), key=lambda item: len(item[1]))


def _on_top(fields: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """`fields` with the `upper` ones in their place. However the upper ones say how many bits layers get, it takes the
    place of how the lower ones do."""
    ways = {name for name in BITS if upper.get(name) is not None}
    lower = {name: value for name, value in fields.items() if not (ways and name in BITS)}
    if not ways and upper.get("primitive", PLANES) != PLANES and lower.get("bits") is None:
        # Shifts are for all layers alike.
        lower = {name: value for name, value in lower.items() if name not in BITS} | {"bits": _STAND_IN_BITS}
    return lower | dict(upper)


def _build(fields: dict[str, Any], overrides: dict[str, Any], origin: str, given: Iterable[str]) -> Recipe:
    """The recipe of `fields` with `overrides` on top.

    given: names of `fields` that the user gave, which become its `model_fields_set` with the overrides.
    """
    ways = [name for name in BITS if name in overrides]
    if len(ways) > 1:
        raise RecipeError(
            f"{' and '.join(_option(name) for name in ways)} say how many bits layers get; give one of them."
        )
    try:
        built = Recipe(**_on_top(fields, overrides))
    except ValidationError as failure:
        faults = [_sentence(error, origin, overrides) for error in failure.errors()]
        raise RecipeError("; ".join(dict.fromkeys(faults)) + ".") from None
    return Recipe.model_construct({*given, *overrides}, **dict(built))


def _no_such_recipe(name: str) -> str:
    names = packaged_names()
    return (
        f"There is no recipe or file {name!r}{_nearest(name, names)}; "
        f"packaged recipes are {', '.join(names)}, anything else must be the path of a YAML file."
    )


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word.replace("-", "_"), list(known), n=1)
    close = close or difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _sentence(error: ErrorDetails, recipe: str, overrides: dict[str, Any]) -> str:
    location = error["loc"]
    if not location:
        changed = "".join(f" {_option(name)}" for name in overrides)
        origin = recipe + (f" with{changed}" if changed else "")
        return f"{origin}: {error['msg'].removeprefix('Value error, ')}"
    field = str(location[0])
    origin = f"Option {_option(field)}" if field in overrides else f"{recipe}, field {field!r}"
    if error["type"] == "extra_forbidden":
        return f"{origin} is unknown{_nearest(field, Recipe.model_fields)}"
    value = error["input"]
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return f"{origin}: {short(value)} is not valid: {message}"


def _option(field: str) -> str:
    """As errors name fields; the command line puts its flag there."""
    return f"`{field}`"
