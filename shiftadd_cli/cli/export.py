"""`shiftadd export`: a checkpoint in a format that others read."""

from __future__ import annotations

from pathlib import Path

import click

from shiftadd_cli.cli.options import remote_code_option


@click.command()
@click.argument("folder", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", "out", metavar="DIR", type=click.Path(path_type=Path), required=True, help="Folder to write."
)
@click.option(
    "--format",
    "form",
    type=click.Choice(("dense", "gguf")),
    required=True,
    help="dense: a transformers folder that needs no shiftadd. gguf: a file for llama.cpp and what reads its files.",
)
@click.option(
    "--dtype",
    type=click.Choice(("auto", "float32", "bfloat16", "float16", "q8_0")),
    default="auto",
    show_default=True,
    help="Type of the numbers: 'auto' is OUT's own for dense and float16 for gguf; q8_0 is for gguf alone.",
)
@remote_code_option
def export(folder: Path, out: Path, form: str, dtype: str, trust_remote_code: bool) -> None:
    """Decode the checkpoint OUT into the folder DIR, which is then as large as the original.

    Weights are those that OUT computes with, rotations folded back, rounded once to the type asked for. One tensor is
    in memory at a time.
    """
    import torch

    from shiftadd_cli.errors import ExportError
    from shiftadd_cli.export.dense import export_dense
    from shiftadd_cli.export.gguf import export_gguf
    from shiftadd_cli.sizes import size

    if form == "gguf":
        path, written = export_gguf(folder, out, "float16" if dtype == "auto" else dtype)
    elif dtype == "q8_0":
        raise ExportError("q8_0 is a type of GGUF files; give --format gguf, or another --dtype.")
    else:
        number = None if dtype == "auto" else getattr(torch, dtype)
        path, written = out, export_dense(folder, out, number, trust_remote_code=trust_remote_code)
    click.echo(f"Written to {path} ({size(written)})")
