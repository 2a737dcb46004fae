"""The Python interface: the commands of the command line, as functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from shiftadd_cli.allocation.cost_table import CostKind, parse_budget
from shiftadd_cli.allocation.plan_file import BitPlan
from shiftadd_cli.allocation.sensitivity import SensitivityKind
from shiftadd_cli.evaluation.compare import evaluate
from shiftadd_cli.generation.job import GenerationJob
from shiftadd_cli.generation.run import Generated
from shiftadd_cli.generation.sampling import Sampling
from shiftadd_cli.pipeline.allocate import AllocationJob, Request
from shiftadd_cli.pipeline.job import Job
from shiftadd_cli.pipeline.linearize import Linearized, LinearizeJob
from shiftadd_cli.pipeline.linearize_settings import LinearizeSettings
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.report.schema import Report
from shiftadd_cli.runtime.load import load
from shiftadd_cli.source import open_source
from shiftadd_cli.source.in_memory import as_folder

__all__ = ["allocate_bits", "evaluate", "generate", "linearize", "load", "quantize"]


def quantize(
    model: str | Path | PreTrainedModel,
    out: str | Path,
    recipe: str | Recipe = "default",
    *,
    processor: Any = None,
    overwrite: bool = False,
    resume: bool = True,
    max_memory: str | None = None,
    trust_remote_code: bool = False,
    **fields: Any,
) -> Report:
    """Compress `model` into the folder `out`; returns the content of report.json.

    model: hub id, folder, .gguf file or `demo`; or a model in memory, which is not changed, with its tokenizer or image
    processor as `processor`. Both are written to a temporary folder next to `out`.
    resume: continue an earlier call with the same arguments that was stopped. max_memory: upper limit on the memory of
    the run, such as "4GB"; a run that is expected to need more is refused.
    trust_remote_code: run model code that comes with `model`, for models that transformers does not know.
    recipe: a packaged name, a YAML file or a `Recipe`; `fields` override its fields (`bits=2`, `group_size=32`, ...).
    Raises ShiftaddError with one sentence that says what to do.
    """
    with as_folder(model, processor, Path(out)) as spec:
        job = Job.prepare(
            spec,
            Path(out),
            _settings(recipe, fields),
            overwrite=overwrite,
            resume=resume,
            max_memory=max_memory,
            trust_remote_code=trust_remote_code,
        )
        report = job.run()
    assert report is not None, "this is the only process"
    return report


def allocate_bits(
    model: str,
    avg_bits: float | None = None,
    target_size: str | None = None,
    recipe: str | Recipe = "default",
    sensitivity: SensitivityKind = "output",
    keep: Iterable[str] = (),
    tie: Iterable[str] = (),
    *,
    max_divergence: float | None = None,
    avg_file_bits: float | None = None,
    cost: CostKind = "bits",
    cost_table: str | Path | None = None,
    max_cost: float | None = None,
    trust_remote_code: bool = False,
    **fields: Any,
) -> BitPlan:
    """The best bits for every layer of `model` within a budget; `shiftadd allocate-bits` writes this to plan.json.

    Sensitivities are cached in $SHIFTADD_CACHE (by default `~/.cache/shiftadd`), so another budget takes seconds.
    `write_text(plan.to_json())` writes the file for `quantize(..., bit_plan="plan.json")`.

    Args:
        model: hub id, folder, .gguf file or `demo`.
        avg_bits: upper limit on the stored bits per weight of the quantized layers; target_size: upper limit on the
            size of all weight files, such as "70MB"; avg_file_bits: the same in bits per parameter; max_divergence:
            upper limit on the predicted loss, in nats per token, at the fewest bytes possible. Give one of them, unless
            `cost` is not "bits".
        recipe: a packaged name, a YAML file or a `Recipe`; `fields` override its fields (`candidates=(2, 3)`,
            `tie_fused=False`, ...). The same as for `quantize`.
        sensitivity: see `allocation.sensitivity`.
        keep: `PATTERN=BITS` for layers that get these bits.
        tie: `PATTERN,PATTERN` for layers that get equal bits within each block.
        cost, cost_table, max_cost: a budget in the unit of a user's table, see `allocation.cost_table`.
        trust_remote_code: run model code that comes with `model`, for models that transformers does not know.

    Raises ShiftaddError with one sentence that says what to do.
    """
    table = None if cost_table is None else Path(cost_table)
    budget = parse_budget(avg_bits, target_size, max_divergence, cost, table, max_cost, avg_file_bits)
    settings = _settings(recipe, fields)
    request = Request(budget, settings.candidates, sensitivity, tuple(keep), tuple(tie), settings.tie_fused)
    source = open_source(model, dtype=settings.dtype, trust_remote_code=trust_remote_code)
    return AllocationJob.prepare(source, settings, request).run()


def generate(
    model: str,
    prompt: str,
    *,
    draft: str | None = None,
    draft_tokens: int | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool | None = None,
    dtype: str = "auto",
    device: str = "auto",
    write: Callable[[str], None] | None = None,
    trust_remote_code: bool = False,
) -> Generated:
    """Load `model`, one of our folders or an original, and let it continue the prompt; the text, tokens and speed.

    Args:
        draft: another model of the same vocabulary, such as the compressed form of `model`, or `lookup`. It drafts
            tokens, which `model` verifies; the text stays the same.
        draft_tokens: length of every draft, 1 to 7; None adapts it to the measured gain.
        temperature, top_p, seed: see `Sampling`; a temperature of 0 takes the likeliest token.
        chat: send the prompt as a message in the chat template; None does so if the model has one.
        dtype: `auto`, `float32`, `bfloat16` or `float16`. device: `auto`, `cpu`, `cuda`, ...
        write: called with every piece of the text as soon as it is available.
        trust_remote_code: run model code that comes with the models.

    Raises ShiftaddError with one sentence that says what to do.
    """
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    job = GenerationJob.prepare(
        model,
        prompt,
        sampling,
        draft=draft,
        draft_tokens=draft_tokens,
        chat=chat,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    return job.run(write)


def linearize(model: str, out: str | Path, *, overwrite: bool = False, **settings: Any) -> Linearized:
    """Give attention layers of `model` a state of constant size, and write the result to the folder `out`.

    model: an original or one of our folders. settings: fields of `LinearizeSettings` (`map="exp"`, `window=64`, ...).
    Raises ShiftaddError with one sentence that says what to do.
    """
    return LinearizeJob.prepare(model, Path(out), LinearizeSettings(**settings), overwrite=overwrite).run()


def _settings(recipe: str | Recipe, fields: dict[str, Any]) -> Recipe:
    """The recipe with some fields changed."""
    return recipe.changed(fields) if isinstance(recipe, Recipe) else Recipe.load(recipe, fields)
