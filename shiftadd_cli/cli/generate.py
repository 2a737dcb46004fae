"""`shiftadd generate`: generate text with a model."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

from shiftadd_cli.cli.options import a_model, dtype_option, remote_code_option, threads_option

if TYPE_CHECKING:
    from shiftadd_cli.generation.run import Generated


@click.command()
@click.argument("model", metavar="OUT", shell_complete=a_model)
@click.option("--prompt", metavar="TEXT", required=True, help="Prompt text; - reads standard input.")
@click.option("--max-new-tokens", type=int, default=128, show_default=True, help="Maximum number of new tokens.")
@click.option(
    "--temperature",
    type=float,
    default=0.0,
    show_default=True,
    help="Sampling temperature; 0 always takes the most likely token.",
)
@click.option(
    "--top-p",
    type=float,
    default=1.0,
    show_default=True,
    help="Sample from the most likely tokens that together have this probability.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Sampling seed; the same seed gives the same text."
)
@click.option(
    "--chat/--no-chat",
    default=None,
    help="Send the prompt as a message in the model's chat template, or as plain text to continue.  "
    "[default: as a message if the model has a chat template]",
)
@click.option(
    "--draft",
    metavar="MODEL|lookup",
    shell_complete=a_model,
    help="Draft tokens with another model of the same vocabulary, such as the compressed form of OUT, or look them up "
    "in the text so far. OUT verifies them, and the text stays the same.",
)
@click.option(
    "--draft-tokens",
    type=int,
    help="Length of every draft, 1 to 7.  [default: adapted to the measured gain]",
)
@dtype_option
@click.option(
    "--device", default="auto", show_default=True, help="Device to run on: 'auto', 'cpu', 'cuda', 'cuda:1', ..."
)
@threads_option
@remote_code_option
@click.option("--json", "as_json", is_flag=True, help="Print the text and measurements as JSON at the end.")
def generate(
    model: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    chat: bool | None,
    draft: str | None,
    draft_tokens: int | None,
    dtype: str,
    device: str,
    threads: int | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Generate text with the model OUT and show its speed.

    OUT is a folder written by `shiftadd quantize`, or an original: a hub id, a folder with safetensors files, a .gguf
    file, or `demo`. The text, without the prompt, is streamed to standard output. The last line, on standard error,
    gives the speed of prefill (until the first new token) and of decode. The model's own generation settings, such as
    penalties, are not used.

    With --draft, OUT verifies several drafted tokens in one pass, and writes the text that it would write alone. The
    usual pair is the original as OUT and its compressed form as the draft. Drafting pauses where it does not pay, and
    the last line says what it gained. With 16-bit numbers, close calls between two tokens can turn out differently than
    without drafts; --dtype float32 has none.
    """
    from shiftadd_cli.generation.sampling import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    text = _read(prompt)

    from transformers.utils import logging

    from shiftadd_cli.device import use_threads
    from shiftadd_cli.generation.job import GenerationJob
    from shiftadd_cli.pipeline.memory import resident_bytes
    from shiftadd_cli.verbosity import tell

    logging.disable_progress_bar()
    use_threads(threads)
    job = GenerationJob.prepare(
        model,
        text,
        sampling,
        draft=draft,
        draft_tokens=draft_tokens,
        chat=chat,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    try:
        generated = job.run(None if as_json else _show)
    except KeyboardInterrupt:
        # The text so far ends in the middle of a line.
        click.echo(err=True)
        raise
    peak = resident_bytes()
    if as_json:
        table = {"model": model, "dtype": job.dtype, "device": str(job.device), "chat": job.prompt.chat, "draft": draft}
        table |= generated.to_dict() | {"load_seconds": job.load_seconds, "peak_memory_bytes": peak}
        click.echo(json.dumps(table, indent=2, ensure_ascii=False, allow_nan=False))
        return
    if not generated.text.endswith("\n"):
        click.echo()
    tell(_describe(generated, job.load_seconds, peak))


def _read(prompt: str) -> str:
    """The prompt itself, or standard input without its final line break."""
    from shiftadd_cli.errors import PromptError

    if prompt != "-":
        return prompt
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError("Standard input is not valid UTF-8 text; convert it first.") from error
    return text.removesuffix("\n").removesuffix("\r")


def _show(piece: str) -> None:
    click.echo(piece, nl=False)


def _describe(generated: Generated, load_seconds: float, peak: int) -> str:
    from shiftadd_cli.sizes import size

    rate = "" if generated.decode_rate is None else f" at {generated.decode_rate:.1f} tokens/s"
    stopped = ", where the context ended" if generated.stopped == "context" else ""
    return (
        f"Prompt {generated.prompt_tokens:,} tokens at {generated.prefill_rate:.1f} tokens/s; "
        f"new {generated.new_tokens:,} tokens{rate}{stopped}{_describe_drafts(generated)}; "
        f"loaded in {load_seconds:.1f} s; peak memory {size(peak)}"
    )


def _describe_drafts(generated: Generated) -> str:
    if (speculated := generated.speculated) is None:
        return ""
    share = f"{speculated.accepted / speculated.drafted:.0%} accepted" if speculated.drafted else "none worth its time"
    gain = "" if generated.gain is None else f", {generated.gain:.2f} x the speed without"
    close = f", {speculated.close_calls:,} close calls" if speculated.close_calls else ""
    return f"; drafted {speculated.drafted:,} tokens, {share}{gain}{close}"
