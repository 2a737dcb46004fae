"""Options that say how a model is run, for the verbs that run one."""

from __future__ import annotations

import click

dtype_option = click.option(
    "--dtype",
    type=click.Choice(("auto", "float32", "bfloat16", "float16")),
    default="auto",
    show_default=True,
    help="Type to compute in; 'auto' takes the stored one, or float32 on a CPU that has no such arithmetic.",
)

threads_option = click.option(
    "--threads", type=click.IntRange(min=1), help="Threads to compute with.  [default: as torch chooses]"
)

remote_code_option = click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run the Python code that comes with a model of a kind unknown to transformers. Read it before: it may do "
    "anything that you may.",
)

team_timeout_option = click.option(
    "--team-timeout",
    metavar="SECONDS",
    type=click.FloatRange(min=1),
    default=7200,
    show_default=True,
    help="Where torchrun started several processes: how long they wait for one of them.",
)
