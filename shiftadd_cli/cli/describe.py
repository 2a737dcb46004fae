"""A plan as text."""

from __future__ import annotations

import textwrap

from shiftadd_cli.artifact.contents import alike
from shiftadd_cli.bcq.choices import choices_in_words
from shiftadd_cli.cli.flags import with_flags
from shiftadd_cli.cli.summary import table
from shiftadd_cli.data import text_builtin
from shiftadd_cli.data.images import images_remark
from shiftadd_cli.data.mixture import parse_mixture
from shiftadd_cli.device import dtype_name
from shiftadd_cli.pipeline.plan import Plan
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.sizes import size
from shiftadd_cli.source.positions import position_limit


def describe_plan(plan: Plan) -> str:
    """Layers, bits, sizes and memory of a plan, shown before the work starts."""
    kinds: dict[str, list[int]] = {}
    for index, linear in enumerate(plan.linears):
        kinds.setdefault(alike(linear.spec.kind), []).append(index)
    rows = []
    for kind, members in kinds.items():
        specs = [plan.linears[i].spec for i in members]
        weights = sum(plan.linears[i].spec.out_features * plan.linears[i].spec.in_features for i in members)
        stored = sum(plan.linears[i].layout.nbytes for i in members)
        shape = " x ".join(_span([getattr(spec, side) for spec in specs]) for side in ("out_features", "in_features"))
        bits = choices_in_words(plan.linears[i].layout.format.choice for i in members)
        rows.append((kind, str(len(members)), shape, bits, f"{8 * stored / weights:.3f}", size(stored)))
    reasons: dict[str, int] = {}
    for _, reason in plan.kept_modules:
        reasons[reason] = reasons.get(reason, 0) + 1
    unchanged = ", ".join(f"{count} x {reason}" for reason, count in reasons.items()) or "nothing"
    source = plan.source
    before = source.model_bytes
    after = f"{'at most ' if plan.open_bits else ''}{size(plan.most_bytes)}"
    dtype = dtype_name(source.dtype)
    return "\n".join(
        (
            f"{source.spec}: {type(source.skeleton()).__name__}, {plan.parameters / 1e6:,.1f} M parameters, "
            f"{len(plan.structure.blocks)} blocks, {len(plan.linears)} linear layers to quantize",
            "",
            table(("layers", "count", "shape", "bits", "bits/weight", "stored"), rows),
            "",
            *_bit_plan(plan),
            *_embeddings(plan),
            *_partial(plan),
            f"Kept          {size(plan.kept_bytes)} in {dtype}: {unchanged}",
            *(f"Not read      {left}" for left in source.left_behind),
            f"Size          {size(before)} in {dtype} (files: {size(source.file_bytes)}) -> {after}, "
            f"{plan.whole_bits_per_weight:.3f} bits/weight over the whole file",
            f"Memory        about {size(plan.peak_memory_bytes)} at the peak",
            *_computed(plan),
            *_calibration(plan),
        )
    )


def _embeddings(plan: Plan) -> list[str]:
    lines = []
    for matrix in plan.tables:
        stored, form = size(matrix.nbytes), matrix.form
        if plan.open_tables:
            stored, form = f"at most {size(matrix.most_bytes)}", "in a form that is chosen with the bits of the layers"
        shape = " x ".join(map(str, matrix.shape))
        lines.append(f"Embedding     {stored}: {' and '.join(matrix.modules)}, {shape}, {form}")
    return lines


def _span(sizes: list[int]) -> str:
    """`384`, or `96-768` where stages differ."""
    distinct = sorted(set(sizes))
    return str(distinct[0]) if len(distinct) == 1 else f"{distinct[0]}-{distinct[-1]}"


def _calibration(plan: Plan) -> list[str]:
    recipe = plan.recipe
    if not plan.calibrated:
        return ["Calibration   none"]
    lines = [f"Calibration   {recipe.calibration}, {_samples(plan)}"]
    if plan.source.reads_images:
        remark = images_remark(recipe.calibration, plan.source.config)
        return [*lines, *([] if remark is None else _wrapped("Note", with_flags(remark, Recipe.model_fields)))]
    if plan.not_written is not None:
        lines += _wrapped("Warning", f"the model does not write its own calibration text: {plan.not_written}")
    if any(part.spec == text_builtin.NAME for part in parse_mixture(recipe.calibration)):
        lines += _wrapped(
            "Warning",
            "the builtin text is the documentation of Python; for a model with any other use, self or a file of "
            "similar text is better calibration data",
        )
    return lines


def _wrapped(title: str, text: str) -> list[str]:
    """A title with a text next to it, wrapped to several lines."""
    return textwrap.wrap(text, 120, initial_indent=f"{title:<14}", subsequent_indent=" " * 14)


def _samples(plan: Plan) -> str:
    recipe = plan.recipe
    if plan.source.reads_images:
        return f"{recipe.samples} images"
    positions = position_limit(plan.source.config)
    longest = ", as many as the model has positions for" if recipe.seq_len == positions else ""
    return (
        f"{recipe.samples} x {recipe.seq_len} tokens{longest}; windows begin with "
        f"{plan.window_start or 'no special token'}"
    )


def _partial(plan: Plan) -> list[str]:
    share = plan.structure.share
    return [f"Partial       only {share:.0%} of the weights in linear layers are compressed"] if share < 0.5 else []


def _computed(plan: Plan) -> list[str]:
    if plan.running is plan.source:
        return []
    stored, computed = (dtype_name(source.dtype) for source in (plan.source, plan.running))
    return [f"Computed      in {computed}, since this processor has no instructions for {stored}"]


def _bit_plan(plan: Plan) -> list[str]:
    if plan.open_bits:
        return [
            f"Bit plan      at most {plan.budget.text}, assigned to layers by their measured sensitivity; the table "
            "shows the fewest bits"
        ]
    if plan.bit_plan is None:
        return []
    budget = plan.bit_plan.made_by.budget
    return [
        f"Bit plan      {plan.recipe.bit_plan or budget}: {plan.bits_per_weight:.3f} stored bits per "
        f"weight on average, {plan.planes_per_weight:.3f} without scales"
    ]
