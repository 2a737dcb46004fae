"""`scripts/benchmark_allocation.py` on a tiny random model: its mixes, measurements, reuse and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from benchmark_allocation import main
from click.testing import CliRunner, Result
from experiments.mixes import bench as bench_module
from experiments.mixes import measure_run
from in_process import in_process
from scipy.stats import kendalltau
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM

import shiftadd_cli
from shiftadd_cli.data.text import load_text, tokenise
from shiftadd_cli.runtime.linear import PackedLinear
from shiftadd_cli.runtime.opened import load_any

CONTEXT, MAX_TOKENS = 32, 200
BUDGETS = "4.5,5.5"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mixes")


@pytest.fixture(scope="module")
def arguments(folder: Path) -> list[str]:
    names = sorted(topics)
    for name, part in (("calibration", names[:8]), ("held-out", names[8:16])):
        (folder / f"{name}.txt").write_text("\n\n".join(topics[topic] for topic in part), encoding="utf-8")
    options: dict[str, Any] = {
        "--recipe": "default:group_size=16,fit=greedy,refine_rounds=0,descent_passes=1,asymmetric=0",
        "--calibration": folder / "calibration.txt",
        "--test": folder / "held-out.txt",
        "--samples": 4,
        "--seq-len": 32,
        "--context": CONTEXT,
        "--max-tokens": MAX_TOKENS,
        "--budgets": BUDGETS,
        "--seeds": "0,1",
        "--sample-blocks": 2,
    }
    return [str(save_tiny("llama", folder / "model")), *(str(part) for pair in options.items() for part in pair)]


def run(arguments: list[str], work: Path, *more: str) -> Result:
    return CliRunner().invoke(main, [*arguments, "--work", str(work), *more])


MAINS = {"experiments.mixes.measure_run": measure_run.main}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    return in_process(monkeypatch, MAINS)


@pytest.fixture(scope="module")
def work(folder: Path, arguments: list[str]) -> Path:
    """The work folder of a finished run, with its artifacts."""
    with pytest.MonkeyPatch.context() as patch:
        commands = in_process(patch, MAINS)
        result = run(arguments, folder / "work", "--keep-artifacts")
    assert result.exit_code == 0, result.output
    assert [command[0] for command in commands].count("experiments.mixes.measure_run") == 6
    return folder / "work"


@pytest.fixture(scope="module")
def table(work: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((work / "table.json").read_text())
    return content


def test_every_budget_has_its_planned_random_and_uniform_mixes(table: dict[str, Any], work: Path) -> None:
    cells = [(mix["seed"], mix["budget"], mix["planner"]) for mix in table["mixes"]]
    planners = ("output", "divergence", "paper", "random", "uniform")
    assert {cell[2] for cell in cells} >= set(planners)
    assert [cell for cell in cells if cell[2] in planners] == [
        (seed, budget, planner) for seed in (0, 1) for budget in (4.5, 5.5) for planner in planners
    ]
    for mix in table["mixes"]:
        if mix["planner"] == "uniform":
            assert len(set(mix["bits"].values())) == 1
            assert mix["bits_per_weight"] >= mix["budget"]
        else:
            assert mix["bits_per_weight"] <= mix["budget"]
        # The row was measured on this mix.
        assert mix["row"]["stored_bits"] == pytest.approx(mix["bits_per_weight"])
        rivals = [row for row in table["mixes"] if (row["seed"], row["budget"]) == (mix["seed"], mix["budget"])]
        if mix["planner"] in mix["predicted"]:
            kind = mix["planner"]
            assert all(
                mix["predicted"][kind] <= row["predicted"][kind] * (1 + 1e-9)
                for row in rivals
                if row["planner"] != "uniform"
            )
    markdown = (work / "table.md").read_text()
    assert sum(line.startswith(("| 4.5 | `", "| 5.5 | `")) for line in markdown.splitlines()) == 2 * len(
        {cell[2] for cell in cells}
    )


def test_sizes_are_met_and_the_cost_of_measuring_is_reported(table: dict[str, Any]) -> None:
    assert len(table["sizes"]) == 5
    for row in table["sizes"]:
        assert 0.97 * row["target_bytes"] <= row["file_bytes"] <= row["target_bytes"]
    assert {(entry["sensitivity"], entry["seed"]) for entry in table["sensitivities"]} >= {
        (kind, seed) for kind in ("output", "divergence", "paper") for seed in (0, 1)
    }
    assert all(entry["seconds"] > 0 and entry["peak_memory_bytes"] > 1e6 for entry in table["sensitivities"])
    assert table["solver"]["linears"] == 560


def test_single_layer_matches_a_model_with_that_weight_replaced(
    table: dict[str, Any], work: Path, folder: Path
) -> None:
    """KL from the logits of transformers' own model with one dense weight replaced."""
    alone = table["alone"]
    assert alone["seed"] == 0
    assert len(alone["kl"]) == 14
    name = "model.layers.1.mlp.down_proj"
    (artifact,) = (
        path
        for path in (work / "artifacts").iterdir()
        if (report := json.loads((path / "report.json").read_text()))["recipe"]["seed"] == 0
        and {layer["bits"] for layer in report["layers"]} == {2}
        and report["bit_plan"]
        and report["calibration"]
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    tokenizer = load_any(str(folder / "model")).tokenizer
    tokens = tokenise(load_text(str(folder / "held-out.txt"), split="test").text, tokenizer)[:MAX_TOKENS]
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    rest = tokens[len(windows) * CONTEXT :].unsqueeze(0)

    def log_probabilities() -> torch.Tensor:
        with torch.no_grad():
            return torch.cat(
                [
                    model(input_ids=part).logits[:, :-1].flatten(0, 1).double().log_softmax(-1)
                    for part in (windows, rest)
                ]
            )

    before = log_probabilities()
    layer = shiftadd_cli.load(artifact).get_submodule(name)
    assert isinstance(layer, PackedLinear)
    inputs = torch.eye(layer.in_features)
    with torch.no_grad():
        model.get_submodule(name).weight.copy_(layer(inputs).T)
    kl = ((before - log_probabilities()) * before.exp()).sum(-1).mean()
    assert alone["kl"][name] == pytest.approx(float(kl), rel=1e-3)


def test_rank_correlations_match_the_rows(table: dict[str, Any], work: Path) -> None:
    rows = [json.loads(path.read_text()) for path in (work / "rows").glob("sensitivity_output*")]
    alone = table["alone"]
    measured = [
        kendalltau([row["costs"][name]["2"] for name in alone["kl"]], list(alone["kl"].values())).statistic
        for row in rows
    ]
    assert min(abs(alone["kendall_tau"]["output"] - tau) for tau in measured) < 1e-9


def test_nothing_is_measured_twice_and_a_killed_run_resumes(
    work: Path, arguments: list[str], started: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (work / "table.md").read_text()
    assert run(arguments, work).exit_code == 0
    assert (started, (work / "table.md").read_text()) == ([], before)
    few = [*arguments[:-6], "--budgets", "4.5", "--seeds", "0", "--sample-blocks", "1"]

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("experiments.quality.bench.evaluate", killed)
        assert run(few, tmp_path).exit_code != 0
    count_before = len(started)
    assert run(few, tmp_path).exit_code == 0
    # The sensitivities, the single layers and the first mixes exist. The last mix and the five sizes are missing.
    assert {command[0] for command in started[count_before:]} == {"shiftadd_cli"}
    mixes = len(json.loads((tmp_path / "table.json").read_text())["mixes"])
    assert len(started) - count_before == max(mixes - 3, 0) + len(bench_module.SIZE_PARTS)
    assert list((tmp_path / "artifacts").iterdir()) == []


def test_slow_sensitivities_can_be_measured_for_one_seed_alone(
    table: dict[str, Any], work: Path, arguments: list[str], started: list[list[str]], tmp_path: Path
) -> None:
    shutil.copytree(work, tmp_path / "work")
    assert run(arguments, tmp_path / "work", "--once", "divergence").exit_code == 0
    assert started == []
    fewer = json.loads((tmp_path / "work" / "table.json").read_text())
    expected = [mix for mix in table["mixes"] if (mix["seed"], mix["planner"]) != (1, "divergence")]
    assert [(mix["seed"], mix["bits"]) for mix in fewer["mixes"]] == [(mix["seed"], mix["bits"]) for mix in expected]
    assert set(fewer["alone"]["kendall_tau"]) == {"output", "divergence", "paper"}
    kinds = [set(entry["kendall_tau"]) for entry in fewer["mix_tau"]]
    assert kinds == [{"output", "divergence", "paper"}, {"output", "paper"}]
    markdown = (tmp_path / "work" / "table.md").read_text()
    assert "`divergence` was measured for the first seed alone." in markdown
    assert all("±" not in line.split("|")[3] for line in markdown.splitlines() if line.startswith("| 4.5 | `diverg"))


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--budgets", "1.5"], "cannot be met"),
        (["--budgets", "many"], "list of numbers"),
        (["--seeds", "0,-1"], "list of numbers"),
        (["--recipe", "rtn"], "--calibration"),
        (["--recipe", "default,gptq"], "one recipe"),
        (["--recipe", "default:avg_bits=3"], "without bits"),
        (["--candidates", "2,9"], "--candidates"),
        (["--sample-bits", "5"], "--sample-bits"),
        (["--once", "paper,guess"], "'guess' is not one of output, divergence, paper"),
        (["--once", "output"], "every seed needs it"),
        (["--test", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_mistake_gives_one_sentence_before_any_work(
    arguments: list[str], tmp_path: Path, options: list[str], part: str
) -> None:
    result = run(arguments, tmp_path / "work", *options)
    assert result.exit_code == 2, result.output
    sentence = result.output.strip().splitlines()[-1]
    assert sentence.startswith("Error: ")
    assert part in sentence
    assert not (tmp_path / "work").exists()


def test_calibration_text_is_refused_as_test_text(arguments: list[str], folder: Path, tmp_path: Path) -> None:
    result = run(arguments, tmp_path / "work", "--test", str(folder / "calibration.txt"))
    assert result.exit_code == 2
    assert "is the calibration text" in result.output
