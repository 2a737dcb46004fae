from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from shiftadd_cli.bcq.primitives.base import Operation
from shiftadd_cli.errors import CostError
from shiftadd_cli.report.unit_costs import OPERATIONS, PACKAGED, load_unit_costs

# M. Horowitz, ISSCC 2014, in picojoules at 45 nm; memories for 64 bits.
HOROWITZ: dict[Operation, float] = {
    "fp16_multiply": 1.1,
    "fp32_add": 0.9,
    "int8_multiply": 0.2,
    "int32_add": 0.1,
    "shift": 0.03,
    "xor_16_bits": 2 * 0.03,
}


def test_packaged_file_names_the_source_of_every_number() -> None:
    units = load_unit_costs()
    assert tuple(units.operations) == OPERATIONS
    assert all("Horowitz" in unit.source for unit in units.operations.values())
    assert {name: units.operations[name].picojoules for name in HOROWITZ} == HOROWITZ
    assert units.operations["sram_16_bits"].picojoules == 10 / 4
    assert units.operations["dram_byte"].picojoules == 1300 / 8


def test_energy_is_a_sum() -> None:
    assert load_unit_costs().energy({"fp32_add": 10, "shift": 100}) == pytest.approx(9 + 3)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"format": "something"}, "is not a file of unit costs"),
        ({"version": 2}, "version"),
        ({"shift": None}, "lack shift"),
        ({"shift": {"picojoules": -1, "source": "x"}}, "shift, picojoules"),
        ({"shift": {"picojoules": float("inf"), "source": "x"}}, "finite"),
        ({"shift": {"picojoules": 1}}, "source"),
        ({"warp": {"picojoules": 1, "source": "x"}}, "warp"),
    ],
)
def test_invalid_files_are_refused_in_one_sentence(tmp_path: Path, change: dict[str, Any], part: str) -> None:
    values = yaml.safe_load(PACKAGED.read_text())
    for name, value in change.items():
        section = values if name in values else values["operations"]
        section[name] = value
        if value is None:
            del section[name]
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(CostError, match=part) as refusal:
        load_unit_costs(path)
    assert "\n" not in str(refusal.value)


def test_missing_and_malformed_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CostError, match="There is no file"):
        load_unit_costs(tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("{")
    with pytest.raises(CostError, match="not valid YAML"):
        load_unit_costs(tmp_path / "broken.yaml")
