"""`shiftadd export`: convert a checkpoint to a format that other programs read."""

from __future__ import annotations

from pathlib import Path

import click

from shiftadd_cli.cli.options import remote_code_option


@click.command()
@click.argument("folder", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", "out", metavar="DIR", type=click.Path(path_type=Path), required=True, help="Output folder."
)
@click.option(
    "--format",
    "form",
    type=click.Choice(("dense", "gguf")),
    required=True,
    help="dense: a transformers folder that loads without shiftadd. gguf: a file for llama.cpp and programs like it.",
)
@click.option(
    "--dtype",
    type=click.Choice(("auto", "float32", "bfloat16", "float16", "q8_0")),
    default="auto",
    show_default=True,
    help="Data type of the tensors: 'auto' is OUT's own type for dense and float16 for gguf; q8_0 is gguf only.",
)
@remote_code_option
def export(folder: Path, out: Path, form: str, dtype: str, trust_remote_code: bool) -> None:
    """Decode the checkpoint OUT into the folder DIR, which ends up as large as the original.

    The weights are the ones OUT computes with: rotations are folded back, and values are rounded once to the requested
    type. Only one tensor is in memory at a time.
    """
    import torch

    from shiftadd_cli.errors import ExportError
    from shiftadd_cli.export.dense import export_dense
    from shiftadd_cli.export.gguf import export_gguf
    from shiftadd_cli.sizes import size

    if form == "gguf":
        path, written = export_gguf(folder, out, "float16" if dtype == "auto" else dtype)
    elif dtype == "q8_0":
        raise ExportError("q8_0 only exists in GGUF files; give --format gguf, or another --dtype.")
    else:
        number = None if dtype == "auto" else getattr(torch, dtype)
        path, written = out, export_dense(folder, out, number, trust_remote_code=trust_remote_code)
    click.echo(f"Written to {path} ({size(written)})")
