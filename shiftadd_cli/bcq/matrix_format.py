"""How a weight matrix is stored: the one object that recipe, bit plan, solver, checkpoint and kernels share.

`MatrixStorage` holds the options that all layers of a model share; `MatrixFormat` adds the primitive and the bits of
one matrix. Shapes come from `weight.PackedLayout`, which combines a format with the rows and columns of a matrix.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from shiftadd_cli.bcq.choices import CODE_BITS, Choice, Primitive, choice_of, parts_of_choice

_FRACTION = re.compile(r"1/([1-9][0-9]{0,8})")
# Larger numbers overflow byte counters.
_LARGEST_SIZE = 10**9 - 1

_Fields = TypeVar("_Fields", bound="OptionFields")


class OptionFields(BaseModel):
    """Immutable options. The description of a field is its help text on the command line."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def values(self, kind: type[OptionFields]) -> dict[str, Any]:
        """The values of the fields that `kind`, the class of these options or one of its bases, defines."""
        assert isinstance(self, kind), f"{kind.__name__} is not a base class of {type(self).__name__}"
        return {name: getattr(self, name) for name in kind.model_fields}

    def part(self, kind: type[_Fields]) -> _Fields:
        """These options as `kind`, one of their base classes."""
        return kind(**self.values(kind))

    def replaced(self: _Fields, **fields: Any) -> _Fields:
        """The same options with new values for some fields. Raises pydantic's ValidationError."""
        return type(self)(**(self.values(type(self)) | fields))


class MatrixStorage(OptionFields):
    """How matrices are stored, independent of their bits. A primitive ignores the fields that do not apply to it."""

    group_size: Annotated[int | str, Field(description="Input columns that share a scale set: a number or 'all'.")]
    group_rows: Annotated[
        int | str,
        Field(description="Output rows that share a scale set: a number, 'all', or '1/N' for 1/N of the rows."),
    ]
    scale_format: Annotated[
        Literal["pot", "apot2", "apot3", "float"],
        Field(description="Scales as one power of two, a signed sum of two or three, or floating point."),
    ]
    row_scale: Annotated[bool, Field(description="One floating-point factor per output row on top of the scales.")]
    offset: Annotated[bool, Field(description="One offset per group, so that levels need not be symmetric.")]
    rotation: Annotated[
        Literal["none", "hadamard"],
        Field(
            description="Rotate the inputs of each linear layer, at run time too, with a random-sign Hadamard "
            "transform, which spreads outliers and costs only additions."
        ),
    ]
    outlier_columns: Annotated[
        float,
        Field(
            ge=0,
            le=0.25,
            description="Share of each linear layer's input columns, those that contribute most to the output, kept at "
            "16 bits in addition to the planes; counted in all sizes.",
        ),
    ]

    @field_validator("group_size", "group_rows", mode="before")
    @classmethod
    def _positive_or_all(cls, value: object, info: ValidationInfo) -> object:
        fractions = info.field_name == "group_rows"
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LARGEST_SIZE:
            return value
        if isinstance(value, str) and (value == "all" or (fractions and _FRACTION.fullmatch(value))):
            return value
        choices = (
            "a whole number above 0, 'all' or a fraction '1/N'" if fractions else "a whole number above 0 or 'all'"
        )
        raise ValueError(f"must be {choices}")

    def at(self, choice: Choice) -> MatrixFormat:
        """The format of a matrix stored as `choice`."""
        primitive, bits = parts_of_choice(choice)
        return MatrixFormat(primitive=primitive, bits=bits, **self.values(MatrixStorage))


class MatrixFormat(MatrixStorage):
    """How one matrix is stored."""

    primitive: Primitive
    bits: int

    @model_validator(mode="after")
    def _primitive_has_the_bits(self) -> MatrixFormat:
        if self.bits not in (widths := CODE_BITS[self.primitive]):
            raise ValueError(f"a code of {self.primitive} has {widths[0]} to {widths[-1]} bits, not {self.bits}")
        return self

    @property
    def choice(self) -> Choice:
        """The primitive and the bits as one choice."""
        return choice_of(self.primitive, self.bits)
