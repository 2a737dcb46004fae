"""`shiftadd linearize`: give attention layers a state of constant size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from shiftadd_cli.cli.options import a_model, threads_option

if TYPE_CHECKING:
    from shiftadd_cli.pipeline.linearize import Linearized


@click.command()
@click.argument("model", shell_complete=a_model)
@click.option(
    "-o", "--output", "out", metavar="OUT", type=click.Path(path_type=Path), required=True, help="Output folder."
)
@click.option(
    "--map",
    "feature_map",
    type=click.Choice(("exp", "angular", "binary", "window")),
    default="exp",
    show_default=True,
    help="Weights of tokens beyond the window: 'exp', sums of fitted exponentials; 'angular', by the angle between "
    "fitted images of query and key; 'binary', by the signs of these images, which needs only additions; 'window' "
    "forgets these tokens.",
)
@click.option("--window", type=int, default=64, show_default=True, help="Nearest tokens, which keep softmax attention.")
@click.option("--sinks", type=int, default=4, show_default=True, help="First tokens of a text, which also keep it.")
@click.option(
    "--layers",
    metavar="auto|all|NUMBERS",
    default="auto",
    show_default=True,
    help="Layers to make linear: numbers such as 0-3,7; 'auto' takes those that cost least by measured divergence.",
)
@click.option(
    "--cache-budget",
    metavar="PERCENT|SIZE",
    default="50%",
    show_default=True,
    help="For --layers auto: upper limit on the cache of a text of --context tokens, as a share of the original's or a "
    "size such as 20MB.",
)
@click.option(
    "--max-divergence",
    metavar="NATS",
    type=float,
    help="For --layers auto, instead of --cache-budget: upper limit on the divergence from MODEL on held-back texts, "
    "in nats per token.",
)
@click.option("--context", type=int, default=8192, show_default=True, help="Tokens at which cache sizes are counted.")
@click.option(
    "--calibration",
    metavar="NAME|FILE",
    default="builtin",
    show_default=True,
    help="Text to fit on: 'builtin' (documentation of Python), wikitext2, c4, ptb, or a .txt, .jsonl or .parquet file.",
)
@click.option("--samples", type=int, default=16, show_default=True, help="Number of calibration windows.")
@click.option("--seq-len", type=int, default=2048, show_default=True, help="Tokens per calibration window.")
@click.option("--steps", type=int, default=120, show_default=True, help="Steps of gradient descent for each layer.")
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is a checkpoint of shiftadd.")
@threads_option
def linearize(
    model: str,
    out: Path,
    feature_map: str,
    window: int,
    sinks: int,
    layers: str,
    cache_budget: str,
    max_divergence: float | None,
    context: int,
    calibration: str,
    samples: int,
    seq_len: int,
    steps: int,
    seed: int,
    overwrite: bool,
    threads: int | None,
) -> None:
    """Give attention layers of MODEL a state of constant size, and write the result to the folder OUT (experimental).

    A linear layer attends to the first and the nearest tokens as before, and to all tokens between through a fitted
    summary, so that its cache stops growing with the text. Nothing else of the model changes. The whole model must fit
    into memory. MODEL may be compressed already. Only language models whose attention layers have transformers'
    standard interface are supported.
    """
    from transformers.utils import logging

    from shiftadd_cli.device import use_threads
    from shiftadd_cli.pipeline.linearize import LinearizeJob
    from shiftadd_cli.pipeline.linearize_settings import LinearizeSettings

    settings = LinearizeSettings(
        map=feature_map,
        window=window,
        sinks=sinks,
        layers=layers,
        cache_budget=cache_budget,
        max_divergence=max_divergence,
        context=context,
        calibration=calibration,
        samples=samples,
        seq_len=seq_len,
        steps=steps,
        seed=seed,
    )
    logging.disable_progress_bar()
    use_threads(threads)
    result = LinearizeJob.prepare(model, out, settings, overwrite=overwrite).run()
    click.echo(describe(result))
    click.echo(f"Written to {out}")


def describe(result: Linearized) -> str:
    """The layers as a table, and the totals."""
    from shiftadd_cli.cli.summary import table
    from shiftadd_cli.sizes import size

    header = ("layer", "error of near tokens", "error", "KL alone, nats/token", "linear")
    rows = [
        (
            str(row.layer),
            f"{row.fit.window_error:.4f}",
            f"{row.fit.error:.4f}",
            "-" if row.divergence is None else f"{row.divergence:.4f}",
            "yes" if row.chosen else "no",
        )
        for row in result.layers
    ]
    share = result.cache_bytes / result.original_cache_bytes
    return "\n".join(
        [
            table(header, rows),
            "",
            f"Linear        {len(result.chosen)} layers; {result.settings.window} nearest tokens and "
            f"{result.settings.sinks} sinks keep softmax attention",
            f"Divergence    {result.divergence:.4f} nats/token from the original, on held-back texts",
            f"Cache         {size(result.original_cache_bytes)} -> {size(result.cache_bytes)} ({share:.0%}) at "
            f"{result.settings.context:,} tokens",
        ]
    )
