"""The one options object: everything that decides what a run of `shiftadd quantize` computes.

A recipe comes from a packaged name (`default`, `fast`, ...) or a YAML file, with options of the command line on top.
Every field is an option of `quantize` and every option of `quantize` that shapes the result is a field here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from shiftadd_cli.bcq.choices import CODE_BITS, Choice, Primitive, ordered_choices, parse_choice

NO_CALIBRATION = "none"

_FRACTION = re.compile(r"1/([1-9][0-9]{0,8})")
_SIZE = re.compile(r"([1-9][0-9]{0,8})(KB|MB|GB)")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


class Recipe(BaseModel):
    """Options of a run; immutable. Field descriptions are the help texts of the command line.

    Constructing one directly raises pydantic's ValidationError; `Recipe.load` raises RecipeError with one sentence.
    The defaults of the fields are those of the recipe `equal-bits`, and what a file leaves out. `model_fields_set` is
    what the user gave: the fields of a file of theirs, options and arguments, but not those of a packaged recipe.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    primitive: Annotated[
        Primitive,
        Field(
            description="What weights are made of: 'bcq', binary planes times scales; 'shift1', a signed power of two, "
            "or 'shift2', a signed sum of two, times the scale of the row."
        ),
    ] = "bcq"
    bits: Annotated[
        int,
        Field(
            ge=1,
            le=8,
            description="Binary planes per weight, 1 to 8; with --primitive shift1 (2 to 4) or shift2 (2 to 5) the "
            "bits of a weight's code.",
        ),
    ] = 3
    avg_bits: Annotated[
        float | None,
        Field(
            gt=0,
            description="Stored bits per weight of the quantized layers, planes, scales and everything counted, not to "
            "be passed: measures how much every layer matters and gives each bits of its own, in place of --bits.",
        ),
    ] = None
    candidates: Annotated[
        tuple[Choice, ...],
        Field(
            strict=False,
            description="What a layer may get where layers get bits of their own: numbers of planes, and shift1 and "
            "shift2 (shift1-2 to shift1-4 and shift2-2 to shift2-5 say the bits of the code, else 3 and 4).",
        ),
    ] = (2, 3, 4)
    tie_fused: Annotated[
        bool,
        Field(
            description="Equal bits and primitives for layers that inference engines fuse (query, key and value; gate "
            "and up), where layers get bits of their own."
        ),
    ] = True
    bit_plan: Annotated[
        str | None,
        Field(
            min_length=1,
            description="File written by `shiftadd allocate-bits`, which gives every layer bits of its own in place "
            "of --bits.",
        ),
    ] = None
    group_size: Annotated[int | str, Field(description="Input columns that share a scale set: a number or 'all'.")] = (
        128
    )
    group_rows: Annotated[
        int | str,
        Field(description="Output rows that share a scale set: a number, 'all', or '1/N' for an N-th of the rows."),
    ] = 1
    scale_format: Annotated[
        Literal["pot", "apot2", "apot3", "float"],
        Field(description="Scales as one power of two, a signed sum of two or three, or floating point."),
    ] = "apot2"
    row_scale: Annotated[bool, Field(description="One floating-point factor per output row on top of the scales.")] = (
        True
    )
    offset: Annotated[bool, Field(description="One offset per group, so that levels need not be symmetric.")] = False
    rotation: Annotated[
        Literal["none", "hadamard"],
        Field(
            description="Rotate the inputs of each linear, at run time too, by a Hadamard transform with random signs, "
            "which spreads outliers and costs additions only."
        ),
    ] = "hadamard"
    outlier_columns: Annotated[
        float,
        Field(
            ge=0,
            le=0.25,
            description="Share of each linear's input columns, those that carry most, kept at 16 bits beside the "
            "planes; counted in all sizes.",
        ),
    ] = 0.0
    fit: Annotated[
        Literal["search", "greedy", "uniform"],
        Field(
            description="How a group is fitted: 'search' alternates least squares from several starts; 'greedy' does "
            "so from the greedy start alone, as LUT-GEMM and ShiftAddLLM; 'uniform' takes the min-max grid and rounds."
        ),
    ] = "search"
    fit_rounds: Annotated[int, Field(ge=0, description="Rounds of alternating least squares per start.")] = 4
    weight_error: Annotated[
        float,
        Field(
            ge=0,
            description="Weight of the weight error beside the output error, relative to the mean diagonal of the "
            "Hessian.",
        ),
    ] = 0.01
    sweep: Annotated[
        Literal["none", "static", "dynamic"],
        Field(
            description="Column sweep that lets later columns make up for earlier errors: scales fixed before it "
            "('static'), or fitted when it reaches the group ('dynamic', as ShiftAddLLM)."
        ),
    ] = "static"
    sweep_order: Annotated[
        Literal["hessian", "natural"],
        Field(description="Order of the sweep: most active input columns first, or as they stand."),
    ] = "hessian"
    refine_rounds: Annotated[
        int, Field(ge=0, description="Rounds of joint scale refit and coordinate descent after the sweep.")
    ] = 2
    descent_passes: Annotated[
        int, Field(ge=1, description="Passes of coordinate descent over the columns in each of these rounds.")
    ] = 2
    bias_correction: Annotated[
        bool,
        Field(
            description="Let the bias of a linear that has one take over the mean of its error, so that its planes "
            "need only fit inputs about their mean."
        ),
    ] = True
    true_sequential: Annotated[
        bool,
        Field(
            description="Calibrate the linears of a block in the order they run, each on what the quantized ones "
            "before it give."
        ),
    ] = True
    asymmetric: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="How far each linear aims at what it gave in the original model, where inputs are unspoilt, "
            "instead of at its own weights: 0 not at all, 1 wholly (as GPTAQ).",
        ),
    ] = 0.5
    loss_aware: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Power of the squared gradient of the model's loss by which a token counts at each linear: 0 "
            "all alike, 1 as GuidedQuant. Costs one pass forwards and backwards through the model.",
        ),
    ] = 0.0
    reconstruct_epochs: Annotated[
        int,
        Field(
            ge=0,
            description="Passes over the calibration text in which each block is tuned by gradient towards its "
            "original output: codes, scales, offsets, norms and biases. 0: not at all.",
        ),
    ] = 0
    distill_epochs: Annotated[
        int,
        Field(
            ge=0,
            description="Passes over the calibration text in which, at the end, row scales, norms and biases of the "
            "whole model are tuned by gradient towards what the original predicts. 0: not at all.",
        ),
    ] = 0
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
    ] = "self"
    writing_length: Annotated[
        int,
        Field(
            ge=2,
            description="Tokens that a model writes at a stretch of its own calibration text; longer windows are put "
            "together of several pieces.",
        ),
    ] = 256
    writing_temperature: Annotated[
        float,
        Field(gt=0, description="Temperature at which a model writes its own calibration text."),
    ] = 1.6
    writing_min_p: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="Where a model writes its own calibration text: the least probability of a token that may be "
            "drawn, as a share of that of the likeliest.",
        ),
    ] = 0.02
    samples: Annotated[int, Field(ge=1, description="Calibration windows, or images.")] = 128
    seq_len: Annotated[
        int,
        Field(
            ge=2,
            description="Tokens per calibration window of a text; where this is not given, no more than the model has "
            "positions for.",
        ),
    ] = 512
    batch_size: Annotated[
        int, Field(ge=1, description="Calibration windows, or images, run at once; more needs more memory.")
    ] = 8
    embedding_bits: Annotated[
        Literal[8, 16],
        Field(
            description="Input embedding and output head, or patch embedding: 8 stores them as 8-bit rows with one "
            "scale each, 16 leaves them as they are."
        ),
    ] = 8
    skip: Annotated[
        tuple[str, ...],
        Field(strict=False, description="Pattern of linear layers to leave as they are; may be given several times."),
    ] = ()
    allow_partial: Annotated[
        bool, Field(description="Compress a model even if less than half of its weights are in layers that can be.")
    ] = False
    seed: Annotated[int, Field(ge=0, lt=2**63, description="Seed of everything random.")] = 0
    device: Annotated[
        str, Field(min_length=1, description="Where to compute: 'auto', 'cpu', 'cuda', 'cuda:1', ...")
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Field(
            description="Type of what stays unquantized, and that is computed in where the processor has instructions "
            "for it (else in float32); 'auto' keeps the model's own."
        ),
    ] = "auto"
    shard_size: Annotated[str, Field(description="Largest weight file to write, in KB, MB or GB.")] = "2GB"

    @field_validator("group_size", "group_rows", mode="before")
    @classmethod
    def _positive_or_all(cls, value: object, info: ValidationInfo) -> object:
        fractions = info.field_name == "group_rows"
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        if isinstance(value, str) and (value == "all" or (fractions and _FRACTION.fullmatch(value))):
            return value
        choices = (
            "a whole number above 0, 'all' or a fraction '1/N'" if fractions else "a whole number above 0 or 'all'"
        )
        raise ValueError(f"must be {choices}")

    @field_validator("candidates", mode="before")
    @classmethod
    def _choices(cls, value: object) -> object:
        if not isinstance(value, (list, tuple)) or not value:
            raise ValueError("must be a list of numbers of planes and shifts, such as [2, 3, 4] or [2, 3, shift2]")
        return ordered_choices(parse_choice(each) for each in value)

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
        if self.avg_bits is not None and self.bit_plan is not None:
            raise ValueError("avg_bits and bit_plan both say how many bits each layer gets; give one of them")
        if self.primitive != "bcq":
            if self.bits not in (widths := CODE_BITS[self.primitive]):
                raise ValueError(
                    f"a code of {self.primitive} has {widths[0]} to {widths[-1]} bits and not {self.bits}; set bits to "
                    "one of these"
                )
            if self.avg_bits is not None or self.bit_plan is not None:
                name = "avg_bits" if self.avg_bits is not None else "bit_plan"
                raise ValueError(
                    f"primitive {self.primitive} is for all layers, and {name} gives each its own; give bits in place "
                    f"of {name}, or set primitive to bcq and name shifts among the candidates"
                )
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

        A packaged name wins over a file of the same name; write `./default` to mean the file.
        Raises RecipeError, naming the file or option, the field and the fault.
        """
        from shiftadd_cli.recipe_file import load_recipe

        return load_recipe(cls, name_or_path, overrides or {})

    def changed(self, fields: dict[str, Any]) -> Recipe:
        """This recipe with other values of some fields, as `load` puts `overrides` on top of a file's."""
        from shiftadd_cli.recipe_file import change_recipe

        return change_recipe(self, fields)
