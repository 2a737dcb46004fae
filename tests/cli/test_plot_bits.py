"""The picture of a plan: its contents, that it is the same every time, and paths that are refused before any work."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from bit_plans import plan_for
from tiny_models import save_tiny

from shiftadd_cli.allocation.plan_file import BitPlan
from shiftadd_cli.cli.plot_bits import check_plot_output, draw_bit_plan
from shiftadd_cli.errors import OutputError
from shiftadd_cli.pipeline.allocate import FrontPoint
from shiftadd_cli.pipeline.plan import make_plan
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.source import LinearSpec, open_source

FRONT = [FrontPoint(2.5, 0.3), FrontPoint(3.0, 0.1), FrontPoint(4.5, 0.02)]


@pytest.fixture(scope="module")
def plan_and_linears(tmp_path_factory: pytest.TempPathFactory) -> tuple[BitPlan, list[LinearSpec]]:
    """A plan and its linears."""
    model = save_tiny("llama", tmp_path_factory.mktemp("plot") / "model")
    recipe = Recipe.load("default", {"group_size": 16})
    linears = [linear.spec for linear in make_plan(open_source(str(model)), recipe).linears]
    return plan_for(model, recipe), linears


def test_picture_shows_every_layer_and_the_curve(plan_and_linears: tuple[BitPlan, list[LinearSpec]]) -> None:
    """Checks the texts and paths of the figure itself."""
    from matplotlib.figure import Figure

    from shiftadd_cli.cli import plot_bits

    plan, linears = plan_and_linears
    upper, lower = Figure().subplots(2)
    plot_bits._draw_grid(upper, plan, linears, (0.5, 0.5))
    plot_bits._draw_front(lower, plan, FRONT)
    kinds = [label.get_text() for label in upper.get_yticklabels()]
    digits = {(round(text.get_position()[0]), kinds[round(text.get_position()[1])]): text.get_text()
              for text in upper.texts}  # fmt: skip
    assert digits == {(spec.block, spec.kind): str(plan.layers[spec.name].bits) for spec in linears}
    colours = {patch.get_facecolor() for patch in upper.patches}
    assert len(colours) == len(set(plan.bits.values())) == 3
    curve, uniform, chosen = lower.get_lines()
    assert list(zip(*curve.get_data(), strict=True)) == FRONT
    assert list(zip(*chosen.get_data(), strict=True)) == [(plan.bits_per_weight, plan.predicted_loss)]
    assert [text.get_text() for text in lower.texts] == ["2", "3", "4"]
    assert list(uniform.get_ydata()) == pytest.approx([len(linears) * 4.0**-bits for bits in (2, 3, 4)])
    assert "nats/token" in lower.get_ylabel()
    assert "bits per weight" in lower.get_xlabel()


def test_shift_layers_are_shown_as_letters_with_a_legend(plan_and_linears: tuple[BitPlan, list[LinearSpec]]) -> None:
    from matplotlib.figure import Figure

    from shiftadd_cli.cli import plot_bits

    plan, linears = plan_and_linears
    layers = {
        name: layer.model_copy(
            update={
                "bytes": {**layer.bytes, "shift2-4": 9},
                "cost": {**layer.cost, "shift2-4": 0.25},
                "bits": "shift2-4",
            }
        )
        for name, layer in plan.layers.items()
    }
    upper, lower = Figure().subplots(2)
    mixed = plan.model_copy(update={"version": 2, "layers": layers})
    plot_bits._draw_grid(upper, mixed, linears, (0.5, 0.5))
    plot_bits._draw_front(lower, mixed, FRONT)
    assert {text.get_text() for text in upper.texts} == {"a"}
    legend = [text.get_text() for text in upper.get_legend().get_texts()]
    assert legend == ["2 bits", "3 bits", "4 bits", "a shift2-4"]
    assert [text.get_text() for text in lower.texts] == ["2", "3", "4", "shift2-4"]


@pytest.mark.parametrize(("suffix", "start"), [(".svg", b"<?xml"), (".png", b"\x89PNG"), (".PDF", b"%PDF")])
def test_same_plan_gives_the_same_bytes_and_settings_are_restored(
    plan_and_linears: tuple[BitPlan, list[LinearSpec]], suffix: str, start: bytes
) -> None:
    import matplotlib

    matplotlib.rcParams["font.size"] = 31.0
    before = dict(matplotlib.rcParams)
    picture = draw_bit_plan(*plan_and_linears, FRONT, suffix)
    assert dict(matplotlib.rcParams) == before
    # The user's settings do not affect the picture.
    matplotlib.rcParams["font.size"] = 10.0
    assert draw_bit_plan(*plan_and_linears, FRONT, suffix) == picture
    assert picture.startswith(start)


def test_module_imports_no_matplotlib() -> None:
    program = "import sys, shiftadd_cli.cli.plot_bits; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("name", ["plan.jpeg", "plan"])
def test_unknown_kind_of_picture_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match=r"\.svg, \.png, \.pdf\.$"):
        check_plot_output(tmp_path / name, tmp_path / "plan.json", overwrite=False)


def test_unwritable_paths_are_refused(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    (tmp_path / "folder.svg").mkdir()
    (tmp_path / "there.svg").touch()
    for name, part in (("folder.svg", "is a folder"), ("there.svg", "--overwrite"), ("no/p.svg", "does not exist")):
        with pytest.raises(OutputError, match=part):
            check_plot_output(tmp_path / name, plan, overwrite=False)
    check_plot_output(tmp_path / "there.svg", plan, overwrite=True)
    with pytest.raises(OutputError, match="same file"):
        check_plot_output(tmp_path / "new.svg", tmp_path / "new.svg", overwrite=False)


def test_missing_matplotlib_is_reported_with_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OutputError, match=r"pip install matplotlib"):
        check_plot_output(tmp_path / "plan.svg", tmp_path / "plan.json", overwrite=False)
