"""Plans and reports as text for a terminal or a log."""

from __future__ import annotations

from collections.abc import Sequence

from shiftadd_cli.report.schema import Report
from shiftadd_cli.sizes import size

# Number of layers named in a line; report.json names all.
_NAMED = 3


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first left-aligned, the others right-aligned."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def summarize(report: Report, out: str) -> str:
    """A summary of a run in about a dozen lines."""
    kinds = [
        (
            row.kind,
            str(row.layers),
            f"{row.bits_per_weight:.3f}",
            f"{row.weight_error:.4f}",
            "-" if row.output_error is None else f"{row.output_error:.4f}",
        )
        for row in report.kinds
    ]
    before, after = report.source.model_bytes, report.size.files_bytes
    data = report.calibration
    calibration = "none (weights only)" if data is None else f"{data.name}, {data.amount}"
    time, machine = report.seconds, report.machine
    return "\n".join(
        (
            table(("layers", "count", "bits/weight", "weight error", "output error"), kinds),
            "",
            f"Calibration   {calibration}",
            f"Size          {size(before)} -> {size(after)} ({before / after:.2f} x smaller)",
            f"Bits/weight   {report.size.bits_per_weight:.3f} in the quantized layers{_code_bits(report)}, "
            f"{report.size.whole_file_bits_per_weight:.3f} over the whole file",
            *_left_behind(report),
            *_starved(report),
            *_reconstruction(report),
            *_distillation(report),
            f"Time          {time.total:.0f} s ("
            + (f"calibration text {time.calibration:.0f}, " if time.calibration >= 1 else "")
            + (f"choosing bits {time.allocate:.0f}, " if time.allocate else "")
            + f"start {time.trace:.0f}, running blocks {time.forward:.0f}, "
            f"solving {time.solve:.0f}, "
            + (f"reconstructing {time.reconstruct:.0f}, " if report.blocks else "")
            + (f"distilling {time.distill:.0f}, " if report.distillation else "")
            + f"checking {time.check:.0f}, reading and writing {time.read_and_write:.0f})",
            f"Peak memory   {size(machine.peak_memory_bytes)} (planned {size(machine.expected_memory_bytes)})",
            f"Written to    {out}",
        )
    )


def _code_bits(report: Report) -> str:
    if len({layer.bits for layer in report.layers}) == 1:
        return ""
    return f" ({report.size.planes_per_weight:.3f} without scales)"


def _left_behind(report: Report) -> list[str]:
    lines = []
    for left in report.source.left_behind:
        plural = "s" * (left.tensors != 1)
        lines.append(f"Not read      {left.part} ({left.tensors} tensor{plural}, {size(left.nbytes)}, {left.reason})")
    return lines


def _starved(report: Report) -> list[str]:
    layers = report.starved
    if not layers:
        return []
    named = ", ".join(f"{layer.name} ({layer.tokens or 0})" for layer in layers[:_NAMED])
    more = f" and {len(layers) - _NAMED} more" if len(layers) > _NAMED else ""
    return [
        f"Few tokens    {len(layers)} of {len(report.layers)} layers read too few to calibrate on, and were fitted to "
        f"their weights alone: {named}{more}"
    ]


def _reconstruction(report: Report) -> list[str]:
    if not report.blocks:
        return []
    improved = [block for block in report.blocks if block.kept]
    ratios = [block.error_after / block.error_before if block.kept else 1.0 for block in report.blocks]
    return [
        f"Blocks        {len(improved)} of {len(report.blocks)} reconstructed; output error on held-out text x "
        f"{sum(ratios) / len(ratios):.2f} on average"
    ]


def _distillation(report: Report) -> list[str]:
    distillation = report.distillation
    if distillation is None:
        return []
    unit = "distance of features" if report.source.reads_images else "KL, nats a token,"
    after = distillation.divergence_after if distillation.kept else None
    change = "unchanged, since tuning made it worse" if after is None else f"-> {after:.4f}"
    return [f"Whole model   {unit} on held-out samples {distillation.divergence_before:.4f} {change}"]
