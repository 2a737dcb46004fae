from __future__ import annotations

import json

import pytest
from benchmark_kernels import Numbers, Row, as_text, main
from click.testing import CliRunner
from compiled import needs_kernels

ROW = Row(
    "64x128",
    3,
    1,
    2,
    3.25,
    seconds={"exact": 2e-6, "fast": 1e-6, "bfloat16": 0.5e-6, "torch float32": 8e-6, "torch bfloat16": 4e-6},
    cpu_seconds={"exact": 3e-6, "fast": 2e-6, "bfloat16": 1e-6, "torch float32": 9e-6, "torch bfloat16": 5e-6},
    weight_bytes={"exact": 4000, "fast": 4000, "bfloat16": 4000, "torch float32": 32768, "torch bfloat16": 16384},
    roof=8e9,
)


def test_ratios_are_relative_to_the_dense_time_and_shares_to_the_roof() -> None:
    assert ROW.ratio("torch float32", "exact") == pytest.approx(4)
    assert ROW.ratio("torch bfloat16", "bfloat16") == pytest.approx(8)
    assert ROW.roof_share("exact") == pytest.approx(0.25)
    cells = as_text([ROW]).splitlines()[1].split()
    assert cells[:9] == ["64x128", "3", "3.25", "1", "2", "4.00", "8.00", "16.00", "8.00"]
    assert cells[-2:] == ["25%", "50%"]


@needs_kernels
def test_every_candidate_is_measured_on_every_problem() -> None:
    arguments = "--shape 64x96 --shape 40x48 --bits 2,3 --batch 1,5 --threads 1 --group-size 32 --rounds 1 --json"
    result = CliRunner().invoke(main, arguments.split())
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    problems = [(row["shape"], row["bits"], row["batch"]) for row in document["rows"]]
    assert problems == [(shape, bits, batch) for shape in ("64x96", "40x48") for bits in (2, 3) for batch in (1, 5)]
    for row in document["rows"]:
        assert set(row["seconds"]) == set(ROW.seconds)
        assert min(row["seconds"].values()) > 0


@needs_kernels
def test_unknown_kernels_are_refused() -> None:
    result = CliRunner().invoke(main, ["--kernels", "mmx"])
    assert result.exit_code == 2
    assert "not 'mmx'" in result.stderr


@pytest.mark.parametrize("text", ["", "1,", "0", "a", "1.5"])
def test_lists_of_numbers_must_be_whole_and_positive(text: str) -> None:
    result = CliRunner().invoke(main, ["--bits", text])
    assert result.exit_code == 2
    assert Numbers.name == "n,n,..."
