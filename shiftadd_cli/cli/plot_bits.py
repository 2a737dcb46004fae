"""A bit plan as a picture: bits over depth by kind of layer, and predicted loss against size.

matplotlib is imported on use, since it is optional (the extra `plot`), and only its figures: no window, no pyplot, and
no setting of it is left changed. The same plan gives the same bytes with the same matplotlib.
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

# Endings, and what matplotlib would otherwise write of the day into such a file.
_DATES: dict[str, dict[str, Any]] = {".svg": {"Date": None}, ".png": {}, ".pdf": {"CreationDate": None}}
# Inches.
_CELL, _MARGIN, _CURVE_HEIGHT = 0.28, 1.9, 3.4
_NARROWEST, _WIDEST = 7.5, 16.0
# A mixture of experts has a row for each linear of each expert.
_HIGHEST = 40.0
# Orange and black against the blue to yellow of cividis: told apart with any kind of colour blindness.
_CHOSEN, _LINE = "#D55E00", "#00204D"


def check_plot_output(out: Path, plan: Path, *, overwrite: bool) -> None:
    """Refuse, before any work, a picture that cannot be made: its kind, matplotlib, its place.

    plan: where plan.json goes. Raises OutputError.
    """
    if out.suffix.lower() not in _DATES:
        raise OutputError(f"--plot {out} is of no kind that can be drawn; end the name in {', '.join(_DATES)}.")
    if importlib.util.find_spec("matplotlib") is None:
        raise OutputError("--plot needs matplotlib, which is not installed; pip install matplotlib, or '.[plot]'.")
    if out.resolve() == plan.resolve():
        raise OutputError(f"--plot and -o name the same file {out}; give each its own.")
    check_plan_output(out, overwrite=overwrite, option="--plot", example="plan.svg")


def draw_bit_plan(plan: BitPlan, linears: Sequence[LinearSpec], front: Sequence[FrontPoint], suffix: str) -> bytes:
    """The picture as the content of a file.

    linears: of the plan, in the order of the model; front: the least loss by size; suffix: `.svg`, `.png` or `.pdf`.
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
        # A user's own matplotlibrc must not show.
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
    """One cell per layer; those that a block lacks stay empty. cell: width and height of one, in inches."""
    import matplotlib
    from matplotlib.patches import Patch, Rectangle

    kinds = list(dict.fromkeys(spec.kind for spec in linears))
    rows = {kind: row for row, kind in enumerate(kinds)}
    blocks = max(spec.block for spec in linears) + 1
    symbols = choice_symbols(choice for layer in plan.layers.values() for choice in layer.bytes)
    candidates = list(symbols)
    colours = {
        bits: matplotlib.colormaps["cividis"](place / max(len(candidates) - 1, 1))
        for place, bits in enumerate(candidates)
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
    # As many names and numbers as there is room for, at round distances.
    across, down = (next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if step * each > 0.2) for each in cell)
    axes.set_xticks(range(0, blocks, across))
    axes.set_yticks(range(0, len(kinds), down), kinds[::down])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("block, from first to last")
    planes_alone = all(isinstance(choice, int) for choice in candidates)
    # A legend of shifts takes the whole width.
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
    places = [
        (8 * sum(layer.bytes[bits] for layer in layers) / plan.weights, sum(layer.cost[bits] for layer in layers))
        for bits in uniform
    ]
    if places:
        axes.plot(*zip(*places, strict=True), "s", color="black", fillstyle="none", label="equal bits for all")
    for bits, place in zip(uniform, places, strict=True):
        axes.annotate(str(bits), place, textcoords="offset points", xytext=(6, 5))
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
        # 0.3 and not 3 x 10^-1; few enough that they do not run into each other.
        axes.yaxis.set_major_formatter(FuncFormatter(_plain))
        axes.yaxis.set_minor_formatter(FuncFormatter(_plain))
    axes.grid(visible=True, which="both", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("stored bits per weight of the quantized layers")
    axes.set_ylabel(f"predicted loss ({unit})")
    axes.set_title(f"predicted loss against size, sensitivity '{plan.made_by.sensitivity}'", loc="left")
    axes.legend(frameon=False)


def _plain(value: float, _: object) -> str:
    """The label of 1, 2, 3 and 5 times a power of ten; nothing for the others, which would run into each other."""
    text = f"{value:.6g}"
    return text if text.replace(".", "").strip("0") in {"1", "2", "3", "5"} or "e" in text else ""
