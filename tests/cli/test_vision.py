"""The commands on a vision model: their output and their refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tiny_models import save_tiny
from tiny_vision import save_pictures, save_tiny_vision

from shiftadd_cli.cli import main

QUICK = (
    "--recipe",
    "equal-bits",
    "--samples",
    "6",
    "--group-size",
    "16",
    "--fit-rounds",
    "1",
    "--refine-rounds",
    "1",
    "--device",
    "cpu",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_vision("swin", tmp_path_factory.mktemp("model") / "swin"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_pictures(tmp_path_factory.mktemp("data") / "pictures", 12, layout="table"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHIFTADD_CACHE", str(tmp_path / "cache"))


def shiftadd(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def test_model_is_quantized_inspected_and_evaluated(model: str, pictures: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantized = shiftadd("quantize", model, "-o", out, "--calibration", pictures, *QUICK)
    assert "6 images" in quantized.stderr
    assert "16-32 x 16-32" in quantized.stderr
    assert "swin.embeddings.patch_embeddings.projection, 16 x 3 x 2 x 2" in quantized.stderr
    assert "pictures (12 images), 6 images" in quantized.stdout
    assert "SwinForImageClassification" in shiftadd("inspect", out, "--verify").stdout
    table = shiftadd("evaluate", out, "--against", model, "--dataset", pictures).stdout.splitlines()
    assert table[0].split()[:3] == ["model", "top-1", "top-5"]
    assert "12, with labels, read as 3 x 16 x 16" in "\n".join(table)
    evaluated = shiftadd("evaluate", out, "--against", model, "--dataset", pictures, "--json", "--max-images", "7")
    document = json.loads(evaluated.stdout)
    assert document["images"] == 7
    assert document["models"][0]["kl"] > 0
    assert document["models"][0]["calibrated_on_test"]
    assert "calibrated on the very data" in evaluated.stderr


@pytest.mark.parametrize("sensitivity", ["output", "divergence", "paper"])
def test_bits_are_allocated(model: str, pictures: str, tmp_path: Path, sensitivity: str) -> None:
    path = tmp_path / "plan.json"
    options = ("--calibration", pictures, *QUICK)
    allocated = shiftadd("allocate-bits", model, "-o", path, "--avg-bits", "5", "--sensitivity", sensitivity, *options)
    assert "6 images" in allocated.stdout
    assert ("nats/image" in allocated.stdout) == (sensitivity != "paper")
    plan = json.loads(path.read_text())
    assert plan["made_by"]["calibration"]["seq_len"] is None
    costs = [layer["cost"] for layer in plan["layers"].values()]
    assert all(cost["2"] > cost["4"] >= 0 for cost in costs)
    shiftadd("quantize", model, "-o", tmp_path / "out", "--bit-plan", path, *options)


def test_estimated_loss_is_close_to_the_measured_loss(model: str, pictures: str, tmp_path: Path) -> None:
    """Sums over layers at four bits, in nats per image: a second-order estimate, and layers replaced one at a time."""
    totals = {}
    for sensitivity in ("output", "divergence"):
        path = tmp_path / f"{sensitivity}.json"
        shiftadd(
            "allocate-bits", model, "-o", path, "--avg-bits", "9", "--candidates", "4", "--sensitivity", sensitivity,
            "--calibration", pictures, *QUICK, "--samples", "12",
        )  # fmt: skip
        layers = json.loads(path.read_text())["layers"].values()
        totals[sensitivity] = sum(layer["cost"]["4"] for layer in layers)
    assert 0.3 < totals["output"] / totals["divergence"] < 3


def test_tuned_and_weighted_runs_work(model: str, pictures: str, tmp_path: Path) -> None:
    options = (
        "--reconstruct-epochs",
        "1",
        "--distill-epochs",
        "1",
        "--loss-aware",
        "0.5",
        "--asymmetric",
        "0.5",
        "--batch-size",
        "2",
    )
    shiftadd("quantize", model, "-o", tmp_path / "out", "--calibration", pictures, *QUICK, *options)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [block["name"].split(".")[-2] for block in report["blocks"]].count("blocks") == 4
    shiftadd("inspect", tmp_path / "out", "--verify")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--calibration", "wikitext2"), "wikitext2 is a text, and a vision model reads images"),
        (("--calibration", "absent/folder/x"), "There are no images at absent/folder/x"),
        (("--samples", "99"), "99 images are requested, but pictures (12 images) has 12"),
    ],
)
def test_wrong_calibration_is_refused_in_one_line(
    model: str, pictures: str, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = shiftadd("quantize", model, "-o", tmp_path / "out", "--calibration", pictures, *arguments, code=2)
    assert message in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert not (tmp_path / "out").exists()


def test_verbs_and_data_for_text_are_refused(model: str, pictures: str, tmp_path: Path) -> None:
    text = save_tiny("llama", tmp_path / "text")
    for arguments, message in (
        (("generate", model, "--prompt", "a"), "is a vision model, which reads no text"),
        (("evaluate", model, "--dataset", "wikitext2"), "is a text, and a vision model reads images"),
        (("evaluate", text, "--dataset", pictures), "is a folder; give a .txt"),
        (("quantize", text, "-o", tmp_path / "out", "--calibration", pictures), "is a folder; give a .txt"),
    ):
        assert message in shiftadd(*arguments, code=2).stderr
