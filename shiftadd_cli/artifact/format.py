"""The `quantization_config` of a checkpoint: which modules are compressed, and how.

    {"quant_method": "shiftadd", "format_version": 1,
     "bits": 3, "group_size": 64, "group_rows": 1, "scale_format": "apot2", "row_scale": true, "offset": false,
     "rotation": "hadamard", "outlier_columns": 0.0,
     "modules": {"model.layers.0.self_attn.q_proj": {"shape": [576, 576]},
                 "model.layers.0.mlp.down_proj": {"shape": [576, 1536], "bits": 2}},
     "tables": {"model.embed_tokens": {"shape": [49152, 576], "primitive": "trellis1", "bits": 4}}}

`modules` lists all compressed modules. `shape` is [out_features, in_features], and any other key of a module overrides
the common value. `group_size` and `group_rows` are as in a recipe ("all", "1/8"). If `rotation` or `outlier_columns` is
absent, there is no rotation or there are no outlier columns.

`tables` lists all compressed embeddings, heads and patch embeddings. `shape` is [rows, columns], or
[rows, channels, height, width] for a convolution. With the key `bits` such a weight is a compressed matrix, and its
other keys are those of a module; the matrix of a convolution has a column for each number of a kernel. Without `bits`
it is 8-bit rows (see `bcq.int8`), which replace `<module>.weight` by `<module>.weight_int8`, int8 of the same shape,
and `<module>.weight_int8_scale`, bfloat16 [rows]. Modules with tied weights are stored and listed once, under the name
that comes first in the model. Without tables the key may be absent.

With `"split_experts": true` the experts of a mixture, which transformers keeps in stacks of matrices, are stored one by
one, compressed or not, as linear layers named `<module>.<expert>.gate_proj`, `up_proj` and `down_proj`.

A module with `primitive` "trellis1" or "trellis2" has trellis-coded planes, see `bcq.primitives.trellis`: `bits` planes
are stored, and one or two more are computed. A module with "shift1" or "shift2" is a shift layer, see
`bcq.primitives.shifts`: `bits` is the width of its codes, and `group_size`, `group_rows`, `scale_format`, `row_scale`
and `offset` do not apply. The default is "bcq". `format_version` is 5 if a table is a compressed matrix, else 4 if
there are trellis-coded planes, else 3 if a table belongs to a convolution, else 2 if there are shift layers, else 1.

With the key `linear_attention`, some attention layers have a state of constant size, see `artifact.linear_attention`,
and `format_version` is 6.

Unknown keys are kept and ignored. Any change to the meaning of the tensors raises `format_version`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from shiftadd_cli.artifact.linear_attention import LinearAttentionFormat
from shiftadd_cli.bcq import int8
from shiftadd_cli.bcq.choices import PLANES
from shiftadd_cli.bcq.matrix_format import MatrixFormat
from shiftadd_cli.bcq.table_layout import TableLayout
from shiftadd_cli.bcq.weight import PackedLayout
from shiftadd_cli.errors import ArtifactError, first_fault
from shiftadd_cli.version import QUANT_METHOD

# The newest version that is read. A checkpoint gets the lowest version it needs: 2 for shift layers, 3 for tables of
# convolutions, 4 for trellis-coded planes, 5 for tables that are compressed matrices, 6 for linear attention.
FORMAT_VERSION = 6

# Maximum digits of a size; larger numbers overflow byte counters.
_MAX_DIGITS = 9

# Every tensor that a compressed matrix may have, see `bcq.weight`, and those of a table, see `bcq.int8`.
SUFFIXES = (
    *("weight_codes", "weight_exponents", "weight_scales", "weight_row_scale", "weight_offset", "weight_signs"),
    *("weight_columns", "weight_column_ids"),
    *int8.SUFFIXES,
)


# Values of the fields that a checkpoint may leave out.
_ABSENT: Mapping[str, Any] = {"primitive": PLANES, "rotation": "none", "outlier_columns": 0.0}


@dataclass(frozen=True)
class ArtifactFormat:
    """The compressed modules and the tables of a checkpoint by name, its linear attention layers, and whether experts
    that transformers keeps in stacks are stored one by one. `common` is the format of modules that override nothing."""

    common: MatrixFormat
    modules: Mapping[str, PackedLayout]
    tables: Mapping[str, TableLayout] = field(default_factory=dict)
    split_experts: bool = False
    linear_attention: LinearAttentionFormat | None = None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ArtifactFormat:
        """Read a `quantization_config`; raises ArtifactError for anything missing, ill-typed or too new."""
        if config.get("quant_method") != QUANT_METHOD:
            raise ArtifactError(f"quant_method is {config.get('quant_method')!r}; this is not a shiftadd checkpoint.")
        version = config.get("format_version")
        if type(version) is not int or version < 1:
            raise ArtifactError(f"format_version is {version!r}; quantize the model again.")
        if version > FORMAT_VERSION:
            raise ArtifactError(
                f"The checkpoint has format_version {version}, and this shiftadd reads up to {FORMAT_VERSION}; "
                "upgrade it: pip install -U shiftadd-cli."
            )
        fields = MatrixFormat.model_fields
        absent = [key for key in (*fields, "modules") if key not in config and key not in _ABSENT]
        if absent:
            raise ArtifactError(f"quantization_config lacks {absent[0]!r}; quantize the model again.")
        shared = {key: config.get(key, _ABSENT.get(key)) for key in fields}
        common = _format(shared)
        _check("modules", config["modules"], isinstance(config["modules"], Mapping))
        modules = {}
        for name, entry in config["modules"].items():
            rows, columns = _shape(name, entry, (2,))
            own = {key: entry[key] for key in fields if key in entry}
            modules[name] = PackedLayout(_format(shared | own) if own else common, rows, columns)
        tables = config.get("tables", {})
        _check("tables", tables, isinstance(tables, Mapping))
        split = config.get("split_experts", False)
        _check("split_experts", split, type(split) is bool)
        layouts = {}
        for name, entry in tables.items():
            shape = _shape(name, entry, (2, 4))
            own = {key: entry[key] for key in fields if key in entry}
            layouts[name] = TableLayout(shape, _format(shared | own) if "bits" in own else None)
        linear = config.get("linear_attention")
        return cls(common, modules, layouts, split, None if linear is None else LinearAttentionFormat.from_dict(linear))

    def to_dict(self) -> dict[str, Any]:
        """The JSON that `from_dict` reads; a module lists only values that differ from the common ones."""
        common = _fields(self.common)
        modules = {
            name: {"shape": [layout.rows, layout.columns]} | _differing(layout.format, common)
            for name, layout in self.modules.items()
        }
        tables = {
            name: {"shape": list(table.shape)}
            | ({} if table.format is None else {"bits": table.format.bits} | _differing(table.format, common))
            for name, table in self.tables.items()
        }
        version = max((layout.primitive.format_version for layout in self.modules.values()), default=1)
        if version == 1:
            del common["primitive"]
        if any(len(table.shape) > 2 for table in self.tables.values()):
            version = max(version, 3)
        if any(table.format is not None for table in self.tables.values()):
            version = 5
        if self.linear_attention is not None:
            version = 6
        config = {"quant_method": QUANT_METHOD, "format_version": version, **common, "modules": modules}
        if tables:
            config["tables"] = tables
        if self.split_experts:
            config["split_experts"] = True
        if self.linear_attention is not None:
            config["linear_attention"] = self.linear_attention.to_dict()
        return config


def _fields(form: MatrixFormat) -> dict[str, Any]:
    """The fields of a format, in the order of the file."""
    fields = form.model_dump()
    return {"bits": fields.pop("bits"), **fields}


def _differing(form: MatrixFormat, common: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in _fields(form).items() if value != common[key]}


def _format(fields: Mapping[str, Any]) -> MatrixFormat:
    try:
        return MatrixFormat(**fields)
    except ValidationError as failure:
        location, _ = first_fault(failure)
        key = location[0] if location else "bits"
        raise _invalid(key, fields[key]) from None


def _shape(name: str, entry: object, sides: tuple[int, ...]) -> tuple[int, ...]:
    shape = entry.get("shape") if isinstance(entry, Mapping) else None
    if not isinstance(shape, list) or len(shape) not in sides or not all(_is_size(side) for side in shape):
        raise ArtifactError(f"quantization_config gives no shape for {name}; quantize the model again.")
    return tuple(shape)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 < value < 10**_MAX_DIGITS


def _check(key: str, value: object, good: bool) -> None:
    if not good:
        raise _invalid(key, value)


def _invalid(key: str, value: object) -> ArtifactError:
    return ArtifactError(f"quantization_config has {key} = {value!r}, which is not valid; quantize the model again.")
