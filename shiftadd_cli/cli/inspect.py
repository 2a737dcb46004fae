"""`shiftadd inspect`: list the contents of a checkpoint and verify them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from shiftadd_cli.artifact.contents import Contents
    from shiftadd_cli.artifact.linear_attention import LinearAttentionFormat


@click.command()
@click.argument("folder", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--verify", "check", is_flag=True, help="Read and check all tensors; exits with 2 if any is damaged.")
@click.option("--layers", is_flag=True, help="Print one line per layer instead of one per kind.")
@click.option("--json", "as_json", is_flag=True, help="Print the contents as JSON, and nothing else.")
def inspect(folder: Path, check: bool, layers: bool, as_json: bool) -> None:
    """Show the contents of the checkpoint OUT by kind of layer, with their size on disk.

    Only reads file headers. --verify also reads all tensors and checks completeness, shapes, checksums and finite
    values.
    """
    from shiftadd_cli.artifact.contents import Contents
    from shiftadd_cli.artifact.folder import Artifact
    from shiftadd_cli.artifact.verify import verify

    artifact = Artifact.open(folder)
    if check:
        verify(artifact)
    contents = Contents.of(artifact)
    if as_json:
        click.echo(json.dumps(contents.to_dict() | {"verified": check}, indent=2, ensure_ascii=False))
    else:
        click.echo(_describe(contents, layers=layers, verified=check))


def _describe(contents: Contents, *, layers: bool, verified: bool) -> str:
    from shiftadd_cli.bcq.choices import choice_of
    from shiftadd_cli.cli.summary import table
    from shiftadd_cli.sizes import size

    rows = [
        (
            row.name,
            str(row.count),
            f"{row.out_features} x {row.in_features}",
            str(choice_of(row.primitive, row.bits)),
            row.scale_format,
            f"{8 * row.stored_bytes / row.weights:.3f}",
            size(row.stored_bytes),
        )
        for row in (contents.layers if layers else contents.kinds)
    ]
    unchanged = [
        (tensor.name, str(tensor.count), " x ".join(map(str, tensor.shape)), tensor.dtype, size(tensor.stored_bytes))
        for tensor in (contents.kept if layers else contents.kept_kinds)
    ]
    lines = [
        f"{contents.folder}: {contents.architecture}, format version {contents.format_version}, "
        f"{contents.files} weight file{'s' if contents.files > 1 else ''}",
        "",
        table(("compressed", "count", "shape", "bits", "scales", "bits/weight", "stored"), rows),
        *_tables(contents),
        "",
        table(("kept as they were", "count", "shape", "dtype", "stored"), unchanged),
        "",
        f"Compressed    {size(contents.packed_bytes)} for {contents.packed_weights:,} weights, "
        f"{contents.bits_per_weight:.3f} bits/weight",
        *([f"Embeddings    {size(contents.table_bytes)}"] if contents.tables else []),
        *([] if contents.linear_attention is None else [_linear_attention(contents.linear_attention)]),
        f"Kept          {size(contents.kept_bytes)}",
        f"Files         {size(contents.file_bytes)}, {contents.file_bits_per_weight:.3f} bits/weight over everything",
    ]
    if verified:
        lines.append(
            "Verified      complete, every tensor as the format says, all values finite"
            + (", checksums as in report.json" if contents.has_checksums else ", no checksums to compare")
        )
    return "\n".join(lines)


def _linear_attention(form: LinearAttentionFormat) -> str:
    return (
        f"Attention     linear in {len(form.modules)} layers: map {form.map}, {form.window} nearest tokens, "
        f"{form.sinks} sinks"
    )


def _tables(contents: Contents) -> list[str]:
    from shiftadd_cli.bcq.choices import table_words
    from shiftadd_cli.cli.summary import table
    from shiftadd_cli.sizes import size

    rows = [
        (
            tensor.name,
            f"{tensor.rows} x {tensor.columns}",
            table_words(tensor.primitive, tensor.bits),
            f"{8 * tensor.stored_bytes / tensor.weights:.3f}",
            size(tensor.stored_bytes),
        )
        for tensor in contents.tables
    ]
    return ["", table(("embeddings", "shape", "form", "bits/weight", "stored"), rows)] if rows else []
