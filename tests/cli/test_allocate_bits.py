"""`shiftadd allocate-bits` from the command line, and `quantize` with its plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tiny_models import save_tiny

from shiftadd_cli.cli import main
from shiftadd_cli.cli.allocate_bits import allocate_bits

QUICK = ["--recipe", "equal-bits", "--samples", "4", "--seq-len", "24", "--group-size", "16", "--fit-rounds", "1"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHIFTADD_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen2", tmp_path_factory.mktemp("source") / "model")


def shiftadd(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def test_plan_is_written_shown_and_used(model: Path, tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    allocated = shiftadd("allocate-bits", model, "-o", plan, "--avg-bits", "5", *QUICK)
    assert allocated.exit_code == 0, allocated.output
    for part in (
        "self_attn.q_proj",
        "uniform 3",
        "Budget        5 bits per weight",
        "code bits",
        "Peak memory",
        str(plan),
    ):
        assert part in allocated.stdout
    quantized = shiftadd("quantize", model, "-o", out, "--bit-plan", plan, *QUICK)
    assert quantized.exit_code == 0, quantized.output
    bits = {name: layer["bits"] for name, layer in json.loads(plan.read_text())["layers"].items()}
    report = json.loads((out / "report.json").read_text())
    assert {layer["name"]: layer["bits"] for layer in report["layers"]} == bits
    assert report["size"]["bits_per_weight"] <= 5
    shown = json.loads(shiftadd("inspect", out, "--verify", "--json").stdout)
    assert {layer["name"]: layer["bits"] for layer in shown["layers"]} == bits
    assert f"{shown['bits_per_weight']:.3f} stored bits per weight" in allocated.stdout
    again = shiftadd("allocate-bits", model, "-o", plan, "--avg-bits", "5", *QUICK)
    assert again.exit_code == 2
    assert "--overwrite" in again.stderr
    assert shiftadd("allocate-bits", model, "-o", plan, "--avg-bits", "5", "--overwrite", *QUICK).exit_code == 0


def test_curve_shows_less_predicted_loss_for_more_bits(model: Path, tmp_path: Path) -> None:
    result = shiftadd("allocate-bits", model, "-o", tmp_path / "p", "--avg-bits", "5", "--curve", "4.5:6:0.5", *QUICK)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("budget"))
    rows = [line.split() for line in lines[start + 1 : start + 5]]
    assert [row[0] for row in rows] == ["4.5", "5", "5.5", "6"]
    assert all(float(row[5]) <= float(row[0]) for row in rows)
    losses = [float(row[-1]) for row in rows]
    assert losses == sorted(losses, reverse=True)
    # The sensitivities are measured once.
    assert result.stderr.count("Measuring: 2/2 (100%)") == 1


def test_plan_is_drawn(model: Path, tmp_path: Path) -> None:
    plan, picture = tmp_path / "plan.json", tmp_path / "plan.svg"
    options = ["-o", plan, "--avg-bits", "5", "--plot", picture, *QUICK]
    allocated = shiftadd("allocate-bits", model, *options)
    assert allocated.exit_code == 0, allocated.output
    assert str(picture) in allocated.stdout
    first = picture.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "plan.svg"]
    plan.unlink()
    refused = shiftadd("allocate-bits", model, *options)
    assert (refused.exit_code, plan.exists()) == (2, False)
    assert "plan.svg exists; add --overwrite" in refused.stderr
    assert shiftadd("allocate-bits", model, *options, "--overwrite").exit_code == 0
    assert picture.read_bytes() == first


def test_plan_keeps_to_a_budget_in_units_of_a_cost_table(model: Path, tmp_path: Path) -> None:
    """Costs in the table are proportional to the bits, unlike bytes, which include scales."""
    table, plan = tmp_path / "table.json", tmp_path / "plan.json"
    costs = {"2": 1.0, "3": 1.5, "4": 2.0}
    table.write_text(
        json.dumps(
            {"format": "shiftadd cost table", "version": 1, "cost": "latency", "unit": "ms", "per_weight": costs}
        )
    )
    weights = sum(rows * columns for rows, columns in shapes_of(model, tmp_path))
    options = ["-o", plan, "--cost", "latency", "--cost-table", table, *QUICK]
    allocated = shiftadd("allocate-bits", model, *options, "--max-cost", 1.4 * weights)
    assert allocated.exit_code == 0, allocated.output
    layers = json.loads(plan.read_text())["layers"].values()
    spent = sum(costs[str(layer["bits"])] * layer["shape"][0] * layer["shape"][1] for layer in layers)
    assert 1.3 * weights < spent <= 1.4 * weights * (1 + 1e-6)
    assert f"Latency       {spent:.6g} ms" in allocated.stdout
    few = shiftadd("allocate-bits", model, *options, "--overwrite", "--max-cost", 0.9 * weights)
    assert few.exit_code == 2
    assert f"from {weights:.7g} to {2.0 * weights:.7g} ms" in few.stderr
    lacking = shiftadd("allocate-bits", model, *options, "--overwrite", "--max-cost", weights, "--candidates", "2,5")
    assert (lacking.exit_code, "no latency of 5 bits" in lacking.stderr) == (2, True)


def test_mixture_of_primitives_keeps_to_an_energy_budget(model: Path, tmp_path: Path) -> None:
    """Shift layers are chosen because they cost less in the table, and `quantize` accepts the plan."""
    table, plan, out = tmp_path / "table.json", tmp_path / "plan.json", tmp_path / "out"
    costs = {"2": 1.0, "3": 1.5, "shift1": 0.5, "shift2": 0.75}
    head = {"format": "shiftadd cost table", "version": 1, "cost": "energy", "unit": "pJ"}
    table.write_text(json.dumps(head | {"per_weight": costs}))
    weights = sum(rows * columns for rows, columns in shapes_of(model, tmp_path))
    options = ["--cost", "energy", "--cost-table", table, "--candidates", "2,3,shift1,shift2", *QUICK]
    allocated = shiftadd("allocate-bits", model, "-o", plan, *options, "--max-cost", 0.7 * weights)
    assert allocated.exit_code == 0, allocated.output
    layers = json.loads(plan.read_text())["layers"].values()
    assert {layer["bits"] for layer in layers} == {"shift1-3", "shift2-4"}
    assert "a is shift1-3, b is shift2-4" in allocated.stdout
    quantized = shiftadd("quantize", model, "-o", out, "--bit-plan", plan, *QUICK)
    assert quantized.exit_code == 0, quantized.output
    listing = shiftadd("inspect", out, "--verify", "--layers").stdout
    assert "format version 2" in listing
    rows = [line.split() for line in listing.splitlines()]
    for name in ("shift1-3", "shift2-4"):
        assert sum(name in row for row in rows) == sum(layer["bits"] == name for layer in layers)


def shapes_of(model: Path, folder: Path) -> list[list[int]]:
    """`[out, in]` of every layer, from a plan with an ample budget."""
    plan = folder / "shapes.json"
    assert shiftadd("allocate-bits", model, "-o", plan, "--avg-bits", "9", *QUICK).exit_code == 0
    return [layer["shape"] for layer in json.loads(plan.read_text())["layers"].values()]


def test_plan_is_the_smallest_within_a_divergence(model: Path, tmp_path: Path) -> None:
    options = ["--sensitivity", "divergence", "--candidates", "2,3", *QUICK]
    allocated = shiftadd("allocate-bits", model, "-o", tmp_path / "all", "--max-divergence", "1e9", *options)
    assert allocated.exit_code == 0, allocated.output
    smallest = json.loads((tmp_path / "all").read_text())
    assert {layer["bits"] for layer in smallest["layers"].values()} == {2}
    limit = 0.6 * sum(layer["cost"]["2"] for layer in smallest["layers"].values())
    allocated = shiftadd("allocate-bits", model, "-o", tmp_path / "plan", "--max-divergence", limit, *options)
    assert allocated.exit_code == 0, allocated.output
    assert f"Budget        {limit:g} nats/token of predicted loss" in allocated.stdout
    assert "(nats/token), from the sensitivity 'divergence'" in allocated.stdout
    plan = json.loads((tmp_path / "plan").read_text())
    assert sum(layer["cost"][str(layer["bits"])] for layer in plan["layers"].values()) <= limit
    refused = shiftadd("allocate-bits", model, "-o", tmp_path / "none", "--max-divergence", "1e-9", *options)
    assert refused.exit_code == 2
    assert refused.stderr.strip().splitlines()[-1].startswith("Error: A predicted loss of at most 1e-09 cannot be met")
    assert not (tmp_path / "none").exists()


BAD = [
    (["--avg-bits", "5", "--plot", "picture.jpeg"], ".svg, .png, .pdf"),
    (["--avg-bits", "5", "--plot", "nowhere/picture.svg"], "nowhere"),
    ([], "--avg-bits"),
    (["--avg-bits", "3", "--target-size", "1MB"], "--avg-bits"),
    (["--avg-bits", "3", "--max-divergence", "0.1"], "--max-divergence"),
    (["--max-divergence", "nan"], "above 0"),
    (["--max-divergence", "-1"], "above 0"),
    (["--max-divergence", "0.1", "--sensitivity", "paper"], "--sensitivity output"),
    (["--avg-bits", "1"], "from"),
    (["--cost", "latency", "--max-cost", "3"], "--cost-table"),
    (["--cost", "energy", "--cost-table", "lost.json", "--max-cost", "3"], "lost.json"),
    (["--cost", "energy", "--cost-table", "t.json", "--max-cost", "3", "--avg-bits", "3"], "--avg-bits"),
    (["--avg-bits", "5", "--max-cost", "3"], "--cost"),
    (["--target-size", "1KB"], "MB"),
    (["--avg-bits", "5", "--curve", "1:4:1"], "from"),
    (["--avg-bits", "5", "--curve", "4"], "--curve"),
    (["--target-size", "much"], "--target-size"),
    (["--avg-bits", "5", "--candidates", "0,1"], "--candidates"),
    (["--avg-bits", "5", "--candidates", "2,shift9"], "--candidates"),
    (["--avg-bits", "5", "--candidates", "2,shift1", "--sensitivity", "paper"], "shift1-3"),
    (["--avg-bits", "5", "--keep", "*.o_proj=shift9"], "PATTERN=BITS"),
    (["--avg-bits", "5", "--keep", "*.nothing=3"], "--keep"),
    (["--avg-bits", "5", "--keep", "q_proj"], "PATTERN=BITS"),
    (["--avg-bits", "5", "--tie", "*.nothing"], "--tie"),
    (["--avg-bits", "5", "--tie", "*.o_proj,*.down_proj", "--keep", "*.o_proj=2", "--keep", "*.down_proj=3"], "--keep"),
    (["--avg-bits", "5", "--recipe", "fast"], "--calibration"),
    (["--avg-bits", "5", "--calibration", "lost.txt"], "lost.txt"),
]


@pytest.mark.parametrize(("options", "part"), BAD)
def test_bad_input_is_refused_in_one_line_before_any_work(
    model: Path, tmp_path: Path, options: list[str], part: str
) -> None:
    result = shiftadd("allocate-bits", model, "-o", tmp_path / "plan.json", *QUICK, *options)
    assert result.exit_code == 2, result.output
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("Error: ")
    assert part in line
    assert "Measuring" not in result.output
    assert not list(tmp_path.iterdir())


def test_options_are_those_of_a_recipe_without_bits() -> None:
    text = shiftadd("allocate-bits", "--help").stdout
    assert "--group-size" in text
    assert "--bits" not in text.replace("--avg-bits", "")


def test_own_options_hide_none_of_the_recipe() -> None:
    names = [name for parameter in allocate_bits.params for name in (*parameter.opts, *parameter.secondary_opts)]
    assert len(names) == len(set(names))
