from __future__ import annotations

import pytest

from shiftadd_cli.report.schema import LayerReport, Report, average_kinds


def layer(kind: str, rows: int, bits: float, error: float | None) -> LayerReport:
    return LayerReport(
        name=f"block.{kind}",
        kind=kind,
        block=0,
        out_features=rows,
        in_features=10,
        bits=3,
        bits_per_weight=bits,
        weight_error=0.1,
        output_error=error,
        calibrated=error is not None,
    )


def test_kinds_average_bits_over_weights_and_output_errors_over_calibrated_layers() -> None:
    rows = average_kinds([layer("q", 10, 3.0, 0.2), layer("q", 30, 4.0, None), layer("v", 10, 3.0, None)])
    assert [row.kind for row in rows] == ["q", "v"]
    assert rows[0].bits_per_weight == pytest.approx((10 * 3 + 30 * 4) / 40)
    assert rows[0].output_error == pytest.approx(0.2)
    assert rows[1].output_error is None


def test_parts_of_the_schema_have_descriptions() -> None:
    schema = Report.model_json_schema()
    for part in ("SizeReport", "LayerReport", "TimeReport"):
        assert any("description" in field for field in schema["$defs"][part]["properties"].values())
