"""A bit plan as a plot: bits over depth by kind of layer, and predicted loss against size.

matplotlib is optional (the extra `plot`), so it is imported on use, and only its figures: no window, no pyplot, and no
lasting change to its settings. The same plan gives the same bytes with the same matplotlib.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shiftadd_cli.allocation.plan_file import BitPlan
from shiftadd_cli.bcq.choices import Choice, choice_symbols, ordered_choices
from shiftadd_cli.cli.describe_bits import unit_of
from shiftadd_cli.cli.plan_output import check_plan_output
from shiftadd_cli.errors import OutputError
from shiftadd_cli.pipeline.allocate import FrontPoint
from shiftadd_cli.source import LinearSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# File suffixes, with the metadata that keeps matplotlib from writing the date into the file.
_DATES: dict[str, dict[str, Any]] = {".svg": {"Date": None}, ".png": {}, ".pdf": {"CreationDate": None}}
# Inches.
_CELL, _MARGIN, _CURVE_HEIGHT = 0.28, 1.9, 3.4
_NARROWEST, _WIDEST = 7.5, 16.0
# Needed because a mixture of experts has a row for each linear of each expert.
_HIGHEST = 40.0
# Orange and dark blue against the blue-to-yellow cividis: distinguishable with any kind of colour blindness.
_CHOSEN, _LINE = "#D55E00", "#00204D"


def check_plot_output(out: Path, plan: Path, *, overwrite: bool) -> None:
    """Refuse, before any work, a plot that cannot be drawn: unknown suffix, no matplotlib, unwritable path.

    plan: path of plan.json. Raises OutputError.
    """
    if out.suffix.lower() not in _DATES:
        raise OutputError(f"--plot {out} has an unsupported file type; end the name in {', '.join(_DATES)}.")
    if importlib.util.find_spec("matplotlib") is None:
        raise OutputError("--plot needs matplotlib, which is not installed; pip install matplotlib, or '.[plot]'.")
    if out.resolve() == plan.resolve():
        raise OutputError(f"--plot and -o name the same file {out}; give each its own file.")
    check_plan_output(out, overwrite=overwrite, option="--plot", example="plan.svg")


def draw_bit_plan(plan: BitPlan, linears: Sequence[LinearSpec], front: Sequence[FrontPoint], suffix: str) -> bytes:
    """The plot as the content of a file.

    linears: the plan's layers in model order; front: the least loss by size; suffix: `.svg`, `.png` or `.pdf`.
    """
    import matplotlib
    from matplotlib.figure import Figure

    blocks = max(spec.block for spec in linears) + 1
    kinds = len({spec.kind for spec in linears})
    width = min(max(_NARROWEST, _MARGIN + blocks * _CELL), _WIDEST)
    grid_height = min(kinds * _CELL, _HIGHEST) + 0.6
    cell = ((width - _MARGIN) / blocks, min(_CELL, _HIGHEST / kinds))
    content = io.BytesIO()
    with matplotlib.rc_context():
        # The user's matplotlibrc must not affect the plot.
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.hashsalt": "shiftadd", "font.size": 9.0, "axes.titlesize": 10.0})
        figure = Figure(figsize=(width, grid_height + _CURVE_HEIGHT + 1.0), layout="constrained")
        upper, lower = figure.subplots(2, 1, height_ratios=(grid_height, _CURVE_HEIGHT))
        _draw_grid(upper, plan, linears, cell)
        _draw_front(lower, plan, front)
        figure.suptitle(f"{plan.model.name}: {plan.bits_per_weight:.3f} stored bits per weight", fontsize=11)
        figure.savefig(content, format=suffix.lower().removeprefix("."), metadata=_DATES[suffix.lower()], dpi=150)
    return content.getvalue()


def _draw_grid(axes: Axes, plan: BitPlan, linears: Sequence[LinearSpec], cell: tuple[float, float]) -> None:
    """Draw one cell per layer; cells without a layer stay empty. cell: width and height of a cell, in inches."""
    import matplotlib
    from matplotlib.patches import Patch, Rectangle

    kinds = list(dict.fromkeys(spec.kind for spec in linears))
    rows = {kind: row for row, kind in enumerate(kinds)}
    blocks = max(spec.block for spec in linears) + 1
    symbols = choice_symbols(choice for layer in plan.layers.values() for choice in layer.bytes)
    candidates = list(symbols)
    colours = {
        bits: matplotlib.colormaps["cividis"](index / max(len(candidates) - 1, 1))
        for index, bits in enumerate(candidates)
    }
    for spec in linears:
        bits = plan.layers[spec.name].bits
        row = rows[spec.kind]
        axes.add_patch(Rectangle((spec.block - 0.5, row - 0.5), 1, 1, facecolor=colours[bits], edgecolor="white"))
        if min(cell) > 0.1:
            light = sum(part * share for part, share in zip(colours[bits], (0.30, 0.59, 0.11), strict=False)) > 0.5
            axes.text(
                spec.block,
                row,
                symbols[bits],
                ha="center",
                va="center",
                fontsize=min(9.0, 40 * min(cell)),
                color="black" if light else "white",
            )
    axes.set_xlim(-0.5, blocks - 0.5)
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    # As many labels as fit, at round intervals.
    across, down = (next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if step * side > 0.2) for side in cell)
    axes.set_xticks(range(0, blocks, across))
    axes.set_yticks(range(0, len(kinds), down), kinds[::down])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("block, from first to last")
    planes_alone = all(isinstance(choice, int) for choice in candidates)
    # A legend with shifts takes the full width.
    axes.set_title("bits (binary planes) of every layer" if planes_alone else "", loc="left")
    axes.legend(
        handles=[Patch(facecolor=colours[bits], label=_label(bits, symbols)) for bits in candidates],
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=len(candidates),
        frameon=False,
        borderaxespad=0.2,
        handlelength=1.0,
    )


def _label(choice: Choice, symbols: Mapping[Choice, str]) -> str:
    return f"{choice} bits" if isinstance(choice, int) else f"{symbols[choice]} {choice}"


def _draw_front(axes: Axes, plan: BitPlan, front: Sequence[FrontPoint]) -> None:
    from matplotlib.ticker import FuncFormatter

    unit = unit_of(plan)
    axes.margins(0.05, 0.1)
    axes.plot(
        [point.bits_per_weight for point in front],
        [point.predicted_loss for point in front],
        color=_LINE,
        marker=".",
        label="best choice at each size",
    )
    layers = list(plan.layers.values())
    candidates = ordered_choices(choice for layer in layers for choice in layer.bytes)
    uniform = [choice for choice in candidates if all(choice in layer.bytes for layer in layers)]
    points = [
        (8 * sum(layer.bytes[bits] for layer in layers) / plan.weights, sum(layer.cost[bits] for layer in layers))
        for bits in uniform
    ]
    if points:
        axes.plot(*zip(*points, strict=True), "s", color="black", fillstyle="none", label="equal bits for all")
    for bits, point in zip(uniform, points, strict=True):
        axes.annotate(str(bits), point, textcoords="offset points", xytext=(6, 5))
    axes.plot(
        [plan.bits_per_weight],
        [plan.predicted_loss],
        "D",
        color=_CHOSEN,
        markersize=8,
        label=f"this plan ({plan.made_by.budget})",
    )
    if all(point.predicted_loss > 0 for point in front):
        axes.set_yscale("log")
        # 0.3 instead of 3 x 10^-1, and few enough labels that they do not overlap.
        axes.yaxis.set_major_formatter(FuncFormatter(_plain))
        axes.yaxis.set_minor_formatter(FuncFormatter(_plain))
    axes.grid(visible=True, which="both", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("stored bits per weight of the quantized layers")
    axes.set_ylabel(f"predicted loss ({unit})")
    axes.set_title(f"predicted loss against size, sensitivity '{plan.made_by.sensitivity}'", loc="left")
    axes.legend(frameon=False)


def _plain(value: float, _: object) -> str:
    """The label for 1, 2, 3 and 5 times a power of ten; empty for other values, whose labels would overlap."""
    text = f"{value:.6g}"
    return text if text.replace(".", "").strip("0") in {"1", "2", "3", "5"} or "e" in text else ""
