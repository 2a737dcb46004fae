"""`shiftadd cost`: the memory of a checkpoint, and its energy by a hardware model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shiftadd_cli.cli.options import remote_code_option

if TYPE_CHECKING:
    from shiftadd_cli.report.cost import Cost, WayCost


@click.command()
@click.argument("folder", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--unit-costs",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="YAML file with the energy of single operations.  [default: 45 nm, from the literature]",
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Batch size: tokens that share one read of the weights.",
)
@click.option(
    "--cost-table",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Also write the energy of every layer shape at 1 to 8 bits, for `shiftadd allocate-bits --cost energy`.",
)
@remote_code_option
@click.option("--json", "as_json", is_flag=True, help="Print the costs as JSON, and nothing else.")
def cost(
    folder: Path,
    unit_costs: Path | None,
    batch: int,
    cost_table: Path | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Show the cost of the checkpoint OUT: bytes by part, and the operations and energy of one token.

    Energy is modelled from literature values for single operations, for OUT and for the same model in 16-bit floats
    and in 8- and 4-bit integers, whose quality is not considered. Time is not modelled; `shiftadd benchmark` measures
    it. Only reads file headers.
    """
    from shiftadd_cli.artifact.folder import Artifact
    from shiftadd_cli.report.cost import energy_table, model_cost
    from shiftadd_cli.report.unit_costs import PACKAGED, load_unit_costs
    from shiftadd_cli.runtime.skeleton import artifact_skeleton
    from shiftadd_cli.storage.refusals import write_file

    units = load_unit_costs(unit_costs or PACKAGED)
    artifact = Artifact.open(folder)
    tensors = artifact.tensors
    skeleton = artifact_skeleton(folder, trust_remote_code=trust_remote_code)
    result = model_cost(skeleton, artifact.format, tensors, units, batch=batch)
    if cost_table is not None:
        table = energy_table(artifact.layouts, units, batch=batch).model_dump(mode="json", exclude_none=True)
        write_file(cost_table, json.dumps(table, indent=2) + "\n")
    click.echo(json.dumps(result.to_dict(), indent=2) if as_json else _describe(result))


def _describe(result: Cost) -> str:
    from shiftadd_cli.cli.summary import table
    from shiftadd_cli.sizes import size

    stored = sum(result.parts.values())
    parts = [(part, size(count), f"{count / stored:.1%}") for part, count in result.parts.items()]
    parts.append(("all", size(stored), f"{stored / result.dense_bytes:.1%} of {size(result.dense_bytes)} in 16 bits"))
    tokens = "one token" if result.batch == 1 else f"one token of {result.batch} computed at once"
    # Without compressed layers, there is nothing to relate their costs to.
    compressed = [table(("compressed layers", *_COLUMNS), _rows(result.layers)), ""] if result.layers[0].total else []
    return "\n".join(
        (
            table(("stored", "bytes", "share"), parts),
            "",
            f"Energy of {tokens}, modelled: {result.unit_costs}",
            *compressed,
            table(("whole model", *_COLUMNS), _rows(result.model)),
            "",
            "Data movement is charged to every way alike. Attention and its cache are left out; experts all count.",
        )
    )


_COLUMNS = (
    "multiplications",
    "additions",
    "shifts",
    "exclusive-ors",
    "arithmetic",
    "on chip",
    "DRAM",
    "total",
    "of fp16",
    "arithmetic of fp16",
)


def _rows(costs: tuple[WayCost, ...]) -> list[list[str]]:
    from shiftadd_cli.report.operations import WAYS

    first = costs[0]
    rows = []
    for way_cost in costs:
        counts = way_cost.counts
        grouped = (("fp16_multiply", "int8_multiply"), ("fp32_add", "int32_add"), ("shift",), ("xor_16_bits",))
        rows.append(
            [
                WAYS[way_cost.way],
                *(f"{sum(counts.get(name, 0) for name in names) / 1e6:.1f} M" for names in grouped),
                *(
                    f"{value / 1e6:.0f} uJ"
                    for value in (way_cost.arithmetic, way_cost.on_chip, way_cost.dram, way_cost.total)
                ),
                f"{way_cost.total / first.total:.1%}",
                f"{way_cost.arithmetic / first.arithmetic:.1%}",
            ]
        )
    return rows
