"""All options that affect the result of `shiftadd quantize`, in one object.

A recipe comes from a packaged name (`default`, `fast`, ...) or a YAML file, with command-line options on top.
Every field is an option of `quantize`, and every option of `quantize` that affects the result is a field here.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from shiftadd_cli.bcq.choices import (
    CODE_BITS,
    PLANES,
    ROWS,
    Choice,
    Primitive,
    choice_of,
    has_planes,
    ordered_choices,
    parse_choice,
)
from shiftadd_cli.bcq.matrix_format import MatrixStorage, OptionFields
from shiftadd_cli.bcq.options import FitOptions, SolverOptions
from shiftadd_cli.errors import RecipeError
from shiftadd_cli.recipe_file import configs_folder, packaged_names, read_mapping, short
from shiftadd_cli.sizes import parse_size

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

NO_CALIBRATION = "none"
# The fields that set the bits of the layers.
BITS = ("bits", "avg_bits", "avg_file_bits", "target_size", "bit_plan")
_STAND_IN_BITS = 3
# Values of `embedding_bits` that are not choices of a compressed matrix.
UNCHANGED = 16
# The value for which it is chosen together with the bits of the layers.
_AUTO = "auto"

_SIZE = re.compile(r"([1-9][0-9]{0,8})(KB|MB|GB)")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


class BitOptions(OptionFields):
    """How layers are stored. Exactly one of the fields `BITS` is set, and the others are None."""

    primitive: Annotated[
        Primitive,
        Field(
            description="Form of the weights: 'bcq', binary planes times scales; 'trellis1' and 'trellis2', one or two "
            "more planes than are stored, computed from the stored ones; 'shift1', a signed power of two times the row "
            "scale; 'shift2', a signed sum of two powers of two times the row scale."
        ),
    ]
    bits: Annotated[
        int | None,
        Field(
            ge=1,
            le=8,
            description="Binary planes per weight, 1 to 8. With another --primitive, the stored bits of a weight: 1 to "
            "4 for trellis1, 2 to 3 for trellis2, 2 to 4 for shift1, 2 to 5 for shift2.",
        ),
    ] = None
    avg_bits: Annotated[
        float | None,
        Field(
            gt=0,
            description="Upper limit on the stored bits per weight of the quantized layers, including planes, scales "
            "and all other overhead, but not the embedding. Measures the sensitivity of every layer and allocates bits "
            "per layer, instead of --bits for all.",
        ),
    ] = None
    avg_file_bits: Annotated[
        float | None,
        Field(
            gt=0,
            description="The same limit for the whole file: its bits, those of the embedding included, divided by the "
            "number of parameters.",
        ),
    ] = None
    target_size: Annotated[
        str | None,
        Field(description="The same limit as the size of all weight files, such as 55MB."),
    ] = None
    candidates: Annotated[
        tuple[Choice, ...],
        Field(
            strict=False,
            description="Choices for a layer when bits are allocated per layer: numbers of planes, trellis-coded "
            "planes (trellis1-1 to trellis1-4, trellis2-2 and trellis2-3), and shifts (shift1-2 to shift1-4, shift2-2 "
            "to shift2-5; without a number, shift1 has 3 bits and shift2 has 4).",
        ),
    ]
    tie_fused: Annotated[
        bool,
        Field(
            description="When bits are allocated per layer, use the same bits and primitive for layers that inference "
            "engines fuse (query, key and value; gate and up)."
        ),
    ]
    bit_plan: Annotated[
        str | None,
        Field(
            min_length=1,
            description="File written by `shiftadd allocate-bits` that sets the bits of every layer, instead of --bits "
            "for all.",
        ),
    ] = None

    @field_validator("candidates", mode="before")
    @classmethod
    def _choices(cls, value: object) -> object:
        if not isinstance(value, (list, tuple)) or not value:
            raise ValueError("must be a list of numbers of planes and other forms, such as [2, 3, 4] or [2, 3, shift2]")
        return ordered_choices(parse_choice(choice) for choice in value)

    @field_validator("target_size")
    @classmethod
    def _size_of_a_file(cls, value: str | None) -> str | None:
        if value is not None and parse_size(value) is None:
            raise ValueError("must be a size such as 70MB or 1.5GB")
        return value

    @model_validator(mode="after")
    def _one_way(self) -> BitOptions:
        ways = [name for name in BITS if getattr(self, name) is not None]
        if not ways:
            raise ValueError(f"no field sets the bits of the layers; give {', '.join(BITS[:-1])} or {BITS[-1]}")
        if len(ways) > 1:
            raise ValueError(f"{' and '.join(ways)} cannot both set the bits of the layers; give one of them")
        if self.primitive != PLANES and self.bits is None:
            raise ValueError(
                f"primitive {self.primitive} applies to all layers, but {ways[0]} sets each layer separately; give "
                f"bits in place of {ways[0]}, or set primitive to {PLANES} and list other forms among the candidates"
            )
        widths = CODE_BITS[self.primitive]
        if self.bits is not None and self.bits not in widths:
            raise ValueError(
                f"a {self.primitive} code has {widths[0]} to {widths[-1]} bits, not {self.bits}; set bits within this "
                "range"
            )
        return self

    @property
    def way(self) -> str:
        """The field that sets the bits of the layers."""
        return next(name for name in BITS if getattr(self, name) is not None)

    @property
    def allocates(self) -> bool:
        """Whether the bits of each layer are chosen within a budget."""
        return self.bits is None and self.bit_plan is None

    @property
    def choice(self) -> Choice:
        """The form that every layer is stored in; a placeholder while choices are still open."""
        return choice_of(self.primitive, _STAND_IN_BITS if self.bits is None else self.bits)


class Recipe(FitOptions, MatrixStorage, BitOptions):
    """Options of a run. The field descriptions are the help texts of the command line.

    There are no defaults here: `Recipe.load` takes missing fields from the recipe `default`. It raises RecipeError with
    one sentence; the constructor raises pydantic's ValidationError. `model_fields_set` contains the fields that the
    user gave in their own file, as options or as arguments, but not those of a packaged recipe.
    """

    bias_correction: Annotated[
        bool,
        Field(
            description="Absorb the mean output error of a linear layer into its bias, if it has one, so that the "
            "planes only need to fit inputs relative to their mean."
        ),
    ]
    true_sequential: Annotated[
        bool,
        Field(
            description="Calibrate the linear layers of a block in execution order, each on the outputs of the "
            "quantized layers before it."
        ),
    ]
    loss_aware: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Weigh each token at each linear layer by the squared gradient of the model's loss, raised to "
            "this power: 0 weighs all tokens equally, 1 is GuidedQuant. Costs one forward and backward pass through "
            "the model.",
        ),
    ]
    reconstruct_epochs: Annotated[
        int,
        Field(
            ge=0,
            description="Passes over the calibration text to tune each block by gradient descent towards its original "
            "output: codes, scales, offsets, norms and biases. 0 disables this.",
        ),
    ]
    distill_epochs: Annotated[
        int,
        Field(
            ge=0,
            description="Passes over the calibration text at the end of the run to tune the row scales, norms and "
            "biases of the whole model by gradient descent towards the predictions of the original. 0 disables this.",
        ),
    ]
    calibration: Annotated[
        str,
        Field(
            min_length=1,
            description="Calibration text: 'self' (documents and conversations written by the model; 'self-plain' is "
            "documents only, 'self-chat' conversations only), 'builtin' (the Python documentation), wikitext2, c4, "
            "ptb, a .txt, .jsonl or .parquet file (field or column 'text', or 'messages' for conversations), a mixture "
            "of these such as self:0.8,notes.txt:0.2, or 'none' to run without data. Calibration images for vision "
            "models: 'self' (whichever of the next two suits the model), 'noise' (scenes of random shapes), 'builtin' "
            "(the scikit-learn digits), a folder, a .parquet file, or a data set on the hub as NAME or NAME:SPLIT.",
        ),
    ]
    writing_length: Annotated[
        int,
        Field(
            ge=2,
            description="Tokens per piece when the model writes its own calibration text; longer windows are joined "
            "from several pieces.",
        ),
    ]
    writing_temperature: Annotated[
        float,
        Field(gt=0, description="Sampling temperature when the model writes its own calibration text."),
    ]
    writing_min_p: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="Minimum probability of a sampled token when the model writes its own calibration text, "
            "relative to the probability of the most likely token.",
        ),
    ]
    samples: Annotated[int, Field(ge=1, description="Number of calibration windows, or images.")]
    seq_len: Annotated[
        int,
        Field(
            ge=2,
            description="Tokens per calibration window of text. The default is reduced for models with fewer "
            "positions.",
        ),
    ]
    batch_size: Annotated[
        int, Field(ge=1, description="Calibration windows, or images, per batch; larger batches need more memory.")
    ]
    embedding_bits: Annotated[
        Choice,
        Field(
            description="Form of the input embedding and output head, or of the patch embedding and classifier: 8 "
            "stores 8-bit rows with one scale each, 1 to 7 binary planes, trellis1-1 to trellis1-4, trellis2-2 and "
            "trellis2-3 trellis-coded planes; 16 leaves them unchanged. With 'auto' it is chosen together with the "
            "bits of the layers, among --candidates and 8; it is 8 where these are given."
        ),
    ]
    skip: Annotated[
        tuple[str, ...],
        Field(strict=False, description="Pattern of linear layers to leave unquantized; may be given several times."),
    ]
    allow_partial: Annotated[
        bool, Field(description="Compress a model even if less than half of its weights are in quantizable layers.")
    ]
    device: Annotated[str, Field(min_length=1, description="Device to run on: 'auto', 'cpu', 'cuda', 'cuda:1', ...")]
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Field(
            description="Dtype of the unquantized tensors. Computation uses it too where the processor has "
            "instructions for it, and float32 otherwise. 'auto' keeps the dtype of the model."
        ),
    ]
    shard_size: Annotated[str, Field(description="Maximum size of a weight file, in KB, MB or GB.")]

    @field_validator("embedding_bits", mode="before")
    @classmethod
    def _known_form(cls, value: object) -> object:
        if value in (ROWS, UNCHANGED, _AUTO):
            return value
        choice = parse_choice(value) if isinstance(value, str) or (type(value) is int and 0 < value < ROWS) else None
        if choice is None or not has_planes(choice):
            raise ValueError("must be auto, 16, 8, a number of planes from 1 to 7, or a form of trellis-coded planes")
        return choice

    @field_validator("skip")
    @classmethod
    def _no_empty_pattern(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(not pattern.strip() for pattern in value):
            raise ValueError("must not contain an empty pattern")
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
            raise ValueError(
                "reconstruct_epochs needs groups within single rows; set group_rows to 1, or reconstruct_epochs to 0"
            )
        if (self.reconstruct_epochs or self.distill_epochs) and self.samples <= self.batch_size:
            name = "reconstruct_epochs" if self.reconstruct_epochs else "distill_epochs"
            raise ValueError(
                f"{name} holds out at least one batch of windows; set samples above batch_size ({self.batch_size})"
            )
        if self.calibration == NO_CALIBRATION:
            wrong = [
                text
                for text, on in (
                    (f"bits in place of {self.way}", self.allocates),
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
                    f"measurement, compensation and refinement need calibration text; "
                    f"set {' and '.join(wrong)} (as the recipe 'fast' does), or choose a calibration text"
                )
        return self

    @property
    def solver_options(self) -> SolverOptions:
        """The options of the solver, for matrices stored as the common choice of all layers."""
        return SolverOptions(format=self.at(self.choice), **self.values(FitOptions))

    @property
    def table_choice(self) -> Choice:
        """The form of embeddings and heads; a placeholder while it is still open."""
        return ROWS if self.embedding_bits == _AUTO else self.embedding_bits

    @property
    def open_tables(self) -> bool:
        """Whether a bit plan or an allocation may set the form of embeddings and heads."""
        return self.embedding_bits == _AUTO

    @property
    def table_candidates(self) -> tuple[Choice, ...]:
        """The forms that embeddings and heads are chosen from. Shifts have no kernels, which a head needs: it is the
        largest matrix of a small model."""
        return ordered_choices([*filter(has_planes, self.candidates), ROWS])

    @property
    def follows_original(self) -> bool:
        """Whether a run needs the hidden states of the original model in addition to those of the compressed one."""
        return bool(self.compares_inputs or self.reconstruct_epochs or self.distill_epochs)

    @property
    def compares_inputs(self) -> bool:
        """Whether layers are fitted to what they read in the original model."""
        return bool(self.asymmetric or self.drift)

    @property
    def shard_bytes(self) -> int:
        """`shard_size` in bytes; the units are decimal."""
        match = _SIZE.fullmatch(self.shard_size)
        assert match is not None, "validated on construction"
        return int(match[1]) * _UNITS[match[2]]

    def fingerprint(self, without: Iterable[str] = ()) -> str:
        """SHA-256, in hex, of the recipe as JSON with sorted keys: equal exactly when all fields are.

        without: fields to ignore.
        """
        fields = self.model_dump(mode="json", exclude=set(without))
        canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @classmethod
    def load(cls, name_or_path: str = "default", overrides: dict[str, Any] | None = None) -> Recipe:
        """The packaged recipe of that name, or else the YAML file at that path, with `overrides` (field: value) on top.

        Fields missing from a file come from `default`. A packaged name wins over a file of the same name; write
        `./default` for the file.

        Raises RecipeError, naming the file or option, the field and the fault.
        """
        packaged = name_or_path in packaged_names()
        path = configs_folder() / f"{name_or_path}.yaml" if packaged else Path(name_or_path)
        if not packaged and not path.exists():
            raise RecipeError(_no_such_recipe(name_or_path))
        fields = _packaged_fields(name_or_path) if packaged else read_mapping(path)
        usual = _on_top(_packaged_fields("default"), fields)
        return _build(usual, overrides or {}, f"Recipe {path}", given=() if packaged else fields)

    def changed(self, fields: dict[str, Any]) -> Recipe:
        """This recipe with some fields changed, by the same rules as the `overrides` of `load`."""
        return _build(self.model_dump(), fields, "The recipe", given=self.model_fields_set)


# Every command reads recipes for its help texts, and every report reads all of them.
@cache
def _packaged_fields(name: str) -> Mapping[str, Any]:
    """The fields in the file of a packaged recipe."""
    return read_mapping(configs_folder() / f"{name}.yaml")


def nearest_recipe(fields: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The packaged recipe that differs least from a recipe given as JSON, and the fields to put on top. `default` wins
    ties."""
    differences = {}
    for name in ("default", *packaged_names()):
        usual = Recipe.load(name).model_dump(mode="json")
        on_top = {key: value for key, value in fields.items() if value != usual.get(key)}
        # Whichever of these fields is set replaces the other two.
        differences[name] = {key: value for key, value in on_top.items() if key not in BITS or value is not None}
    return min(differences.items(), key=lambda item: len(item[1]))


def _on_top(fields: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """`fields` overridden by `upper`. Bits set in `upper`, by whichever field, replace those set in `fields`."""
    ways = {name for name in BITS if upper.get(name) is not None}
    lower = {name: value for name, value in fields.items() if not (ways and name in BITS)}
    if not ways and upper.get("primitive", PLANES) != PLANES and lower.get("bits") is None:
        # A shift primitive applies to all layers, so it needs `bits`.
        lower = {name: value for name, value in lower.items() if name not in BITS} | {"bits": _STAND_IN_BITS}
    return lower | dict(upper)


def _build(fields: dict[str, Any], overrides: dict[str, Any], origin: str, given: Iterable[str]) -> Recipe:
    """The recipe of `fields` with `overrides` on top.

    given: names of the `fields` that the user gave; together with the overrides they become its `model_fields_set`.
    """
    ways = [name for name in BITS if name in overrides]
    if len(ways) > 1:
        raise RecipeError(
            f"{' and '.join(_option(name) for name in ways)} each set the bits of the layers; give one of them."
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
        f"packaged recipes are {', '.join(names)}; anything else must be the path of a YAML file."
    )


def _nearest(word: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(word.replace("-", "_"), list(names), n=1)
    close = close or difflib.get_close_matches(word, list(names), n=1)
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
    """A field as error messages write it; the command line substitutes its flag."""
    return f"`{field}`"
