"""quantization_config survives being written and read, and everything ill-formed is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from formats import matrix_format

from shiftadd_cli.artifact.format import FORMAT_VERSION, ArtifactFormat
from shiftadd_cli.bcq.matrix_format import MatrixFormat
from shiftadd_cli.bcq.table_layout import TableLayout
from shiftadd_cli.bcq.weight import PackedLayout
from shiftadd_cli.errors import ArtifactError

COMMON = matrix_format(3, 64, 1, "apot2", True, False)
MODULES = {
    "a": PackedLayout(COMMON, 576, 576),
    "b": PackedLayout(matrix_format(2, 64, 1, "apot2", True, True), 1536, 576),
    "c": PackedLayout(matrix_format(3, 8, "1/8", "float", False, False), 7, 5),
    "d": PackedLayout(matrix_format(3, "all", "all", "pot", True, False), 7, 5),
    "e": PackedLayout(COMMON.replaced(outlier_columns=0.01), 7, 500),
}
VALID = ArtifactFormat(COMMON, MODULES).to_dict()
TABLES = {"embed": TableLayout((49152, 576)), "head": TableLayout((49152, 576))}


def test_a_configuration_survives_being_written_and_read() -> None:
    assert ArtifactFormat.from_dict(json.loads(json.dumps(VALID))) == ArtifactFormat(COMMON, MODULES)


def test_modules_list_only_their_differences() -> None:
    assert VALID["modules"]["a"] == {"shape": [576, 576]}
    assert VALID["modules"]["b"] == {"shape": [1536, 576], "bits": 2, "offset": True}


def test_layouts_resolve_the_words_of_the_recipe() -> None:
    layouts = ArtifactFormat(COMMON, MODULES).modules
    assert list(layouts) == list(MODULES)
    assert (layouts["b"].bits, layouts["b"].scales.offset, layouts["b"].grid.column_groups) == (2, True, 9)
    assert (layouts["c"].grid.group_rows, layouts["c"].grid.group_columns) == (1, 5)
    assert (layouts["d"].grid.row_groups, layouts["d"].grid.column_groups) == (1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "'gptq'"),
        ({"format_version": FORMAT_VERSION + 1}, "upgrade"),
        ({"format_version": "1"}, "format_version is '1'"),
        ({"format_version": 0}, "format_version is 0"),
        ({"bits": 0}, "bits = 0"),
        ({"bits": 9}, "bits = 9"),
        ({"bits": True}, "bits = True"),
        ({"group_size": "1/8"}, "group_size = '1/8'"),
        ({"group_size": 0}, "group_size = 0"),
        ({"group_rows": "1/0"}, "group_rows = '1/0'"),
        ({"group_rows": "half"}, "group_rows = 'half'"),
        ({"scale_format": "apot4"}, "scale_format = 'apot4'"),
        ({"row_scale": 1}, "row_scale = 1"),
        ({"offset": None}, "offset = None"),
        ({"outlier_columns": 1.5}, "outlier_columns = 1.5"),
        ({"outlier_columns": True}, "outlier_columns = True"),
        ({"modules": ["a"]}, "modules = "),
        ({"modules": {"a": {}}}, "no shape for a"),
        ({"modules": {"a": {"shape": [3]}}}, "no shape for a"),
        ({"modules": {"a": {"shape": [3, -1]}}}, "no shape for a"),
        ({"modules": {"a": [3, 4]}}, "no shape for a"),
        ({"modules": {"a": {"shape": [3, 4], "bits": 12}}}, "bits = 12"),
        ({"tables": ["a"]}, "tables = "),
        ({"tables": {"a": {}}}, "no shape for a"),
        ({"tables": {"a": {"shape": [3, 0]}}}, "no shape for a"),
    ],
)
def test_ill_formed_configurations_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        ArtifactFormat.from_dict(VALID | change)


def test_tables_are_listed_if_there_are_any() -> None:
    with_tables = ArtifactFormat(COMMON, MODULES, TABLES)
    written = json.loads(json.dumps(with_tables.to_dict()))
    assert written["tables"] == {"embed": {"shape": [49152, 576]}, "head": {"shape": [49152, 576]}}
    assert ArtifactFormat.from_dict(written) == with_tables
    assert "tables" not in VALID
    assert ArtifactFormat.from_dict(VALID).tables == {}


def test_split_experts_are_declared_if_there_are_any() -> None:
    split = ArtifactFormat(COMMON, MODULES, split_experts=True)
    assert split.to_dict()["split_experts"] is True
    assert ArtifactFormat.from_dict(json.loads(json.dumps(split.to_dict()))) == split
    assert "split_experts" not in VALID
    with pytest.raises(ArtifactError, match="split_experts = 1"):
        ArtifactFormat.from_dict(VALID | {"split_experts": 1})


@pytest.mark.parametrize("key", sorted(VALID.keys() - {"rotation", "outlier_columns"}))
def test_every_other_key_is_required(key: str) -> None:
    with pytest.raises(ArtifactError, match=key):
        ArtifactFormat.from_dict({name: value for name, value in VALID.items() if name != key})


def test_missing_fields_mean_no_rotation_and_no_outliers() -> None:
    short = {name: value for name, value in VALID.items() if name not in ("rotation", "outlier_columns")}
    parsed = ArtifactFormat.from_dict(short)
    assert parsed == ArtifactFormat(COMMON, MODULES)
    assert (parsed.common.rotation, parsed.common.outlier_columns) == ("none", 0.0)


def test_unknown_keys_are_ignored() -> None:
    assert ArtifactFormat.from_dict(VALID | {"tool": "x"}) == ArtifactFormat.from_dict(VALID)


SHIFT = COMMON.replaced(primitive="shift2", bits=4)


def test_shift_layers_are_declared_and_need_version_two() -> None:
    mixed = ArtifactFormat(COMMON, {**MODULES, "s": PackedLayout(SHIFT, 576, 576)})
    written = json.loads(json.dumps(mixed.to_dict()))
    assert written["format_version"] == 2
    assert written["modules"]["s"] == {"shape": [576, 576], "bits": 4, "primitive": "shift2"}
    assert ArtifactFormat.from_dict(written) == mixed
    layout = mixed.modules["s"]
    assert (layout.format.choice, layout.grid.column_groups, layout.scales.scale_format) == ("shift2-4", 1, "none")


def test_tables_of_convolutions_need_version_three() -> None:
    tables = {"patches": TableLayout((384, 3, 14, 14))}
    with_images = ArtifactFormat(COMMON, MODULES, tables)
    written = json.loads(json.dumps(with_images.to_dict()))
    assert (written["format_version"], written["tables"]) == (3, {"patches": {"shape": [384, 3, 14, 14]}})
    assert ArtifactFormat.from_dict(written) == with_images
    assert ArtifactFormat(COMMON, {"s": PackedLayout(SHIFT, 8, 8)}, tables).to_dict()["format_version"] == 3
    for sides in ([384], [384, 3, 14], [384, 3, 14, 0]):
        with pytest.raises(ArtifactError, match="no shape for patches"):
            ArtifactFormat.from_dict(written | {"tables": {"patches": {"shape": sides}}})


@pytest.mark.parametrize("form", [COMMON, COMMON.replaced(bits=5), COMMON.replaced(primitive="trellis1", bits=4)])
def test_tables_of_planes_need_version_five(form: MatrixFormat) -> None:
    tables = {"embed": TableLayout((49152, 576), form), "patches": TableLayout((384, 3, 14, 14), form)}
    mixed = ArtifactFormat(COMMON, MODULES, {**tables, "head": TableLayout((49152, 576))})
    written = json.loads(json.dumps(mixed.to_dict()))
    assert written["format_version"] == 5
    assert ArtifactFormat.from_dict(written) == mixed
    # The number of bits tells such a table from one of 8-bit rows, so it is never left out.
    assert all(written["tables"][name]["bits"] == form.bits for name in tables)
    assert written["tables"]["head"] == {"shape": [49152, 576]}
    packed = mixed.tables["patches"].packed
    assert packed is not None
    assert (packed.rows, packed.columns) == (384, 3 * 14 * 14)
    with pytest.raises(ArtifactError, match="bits = 12"):
        ArtifactFormat.from_dict(written | {"tables": {"embed": {"shape": [3, 4], "bits": 12}}})


@pytest.mark.parametrize(("primitive", "planes"), [("trellis1", 3), ("trellis2", 4)])
def test_trellis_coded_planes_need_version_four(primitive: Any, planes: int) -> None:
    layout = PackedLayout(COMMON.replaced(primitive=primitive, bits=2), 576, 576)
    mixed = ArtifactFormat(COMMON, {**MODULES, "t": layout}, {"patches": TableLayout((384, 3, 14, 14))})
    written = json.loads(json.dumps(mixed.to_dict()))
    assert written["format_version"] == 4
    assert written["modules"]["t"] == {"shape": [576, 576], "bits": 2, "primitive": primitive}
    assert ArtifactFormat.from_dict(written) == mixed
    shapes = layout.tensors()
    assert shapes["weight_codes"][0] == (576, 2, 72)
    assert shapes["weight_exponents"][0] == (576, layout.grid.column_groups * planes * 2 // 2)


def test_planes_among_shift_layers_are_declared() -> None:
    mixed = ArtifactFormat(SHIFT, {"a": PackedLayout(SHIFT, 8, 8), "b": PackedLayout(COMMON, 8, 8)})
    written = json.loads(json.dumps(mixed.to_dict()))
    assert (written["primitive"], written["modules"]["b"]["primitive"]) == ("shift2", "bcq")
    assert ArtifactFormat.from_dict(written) == mixed


def test_no_primitive_is_written_without_shift_layers() -> None:
    assert VALID["format_version"] == 1
    assert "primitive" not in json.dumps(VALID)


@pytest.mark.parametrize(
    "change", [{"primitive": "shift3"}, {"primitive": ["shift1"]}, {"primitive": "shift1", "bits": 5}]
)
def test_shift_layers_that_do_not_exist_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match="which is not valid"):
        ArtifactFormat.from_dict(VALID | {"format_version": 2, "modules": {"a": {"shape": [3, 4], **change}}})
