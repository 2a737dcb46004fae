"""A bit plan as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from shiftadd_cli.allocation.plan_file import BitPlan, PlannedLayer
from shiftadd_cli.artifact.contents import alike
from shiftadd_cli.bcq.choices import Choice, bits_of_choice, choice_symbols, ordered_choices, table_form
from shiftadd_cli.cli.summary import table
from shiftadd_cli.sizes import size
from shiftadd_cli.source import LinearSpec

# Unit of the predicted loss, by sensitivity.
UNITS = {"output": "nats/token", "divergence": "nats/token", "paper": "no unit"}
# The loss of a model without class scores is 1 - cosine of its features.
IMAGE_UNITS = dict.fromkeys(("output", "divergence"), "nats/image, or 1 - cosine of features")


def unit_of(plan: BitPlan) -> str:
    """The unit of the losses of a plan."""
    origin = plan.made_by
    units = UNITS if origin.calibration.seq_len is not None else IMAGE_UNITS
    return units.get(origin.sensitivity, "no unit")


def describe_bit_plan(plan: BitPlan, linears: Sequence[LinearSpec]) -> str:
    """Table of bits by kind and depth, stored size and predicted loss, compared with equal bits for all layers.

    For experts, it shows the most common bits of a block.
    """
    kinds: dict[str, list[LinearSpec]] = {}
    for spec in linears:
        kinds.setdefault(alike(spec.kind), []).append(spec)
    candidates = ordered_choices(choice for layer in plan.layers.values() for choice in layer.bytes)
    symbols = choice_symbols(candidates)
    rows = []
    for kind, members in kinds.items():
        layers = [plan.layers[spec.name] for spec in members]
        depths: dict[int, Counter[str]] = {}
        for spec in members:
            depths.setdefault(spec.block, Counter()).update((symbols[plan.layers[spec.name].bits],))
        usual = {block: counts.most_common(1)[0][0] for block, counts in depths.items()}
        over_depth = "".join(usual.get(block, "-") for block in range(max(spec.block for spec in linears) + 1))
        rows.append((kind, over_depth, *_numbers(layers, [layer.bits for layer in layers])))
    layers = list(plan.layers.values())
    rows.append(("all", "", *_numbers(layers, [layer.bits for layer in layers])))
    for bits in candidates:
        if all(bits in layer.bytes for layer in layers):
            rows.append((f"uniform {bits}", "", *_numbers(layers, [bits] * len(layers))))
    origin = plan.made_by
    unit = unit_of(plan)
    return "\n".join(
        (
            table(("layers", "bits from first to last block", "code bits", "bits/weight", "predicted loss"), rows),
            "",
            *_letters(symbols),
            f"Budget        {origin.budget}",
            f"Stored        {size(plan.stored_bytes)} for the quantized layers: {plan.bits_per_weight:.3f} stored bits "
            f"per weight, {plan.planes_per_weight:.3f} without scales",
            *_embeddings(plan),
            f"Predicted     {plan.predicted_loss:.4g} ({unit}), from the sensitivity '{origin.sensitivity}' on "
            f"{origin.calibration.name}, {origin.calibration.amount}",
        )
    )


def _embeddings(plan: BitPlan) -> list[str]:
    return [
        f"Embedding     {size(entry.bytes[entry.bits])}: {name}, {table_form(entry.bits)}, predicted loss "
        f"{entry.cost[entry.bits]:.4g}"
        for name, entry in plan.tables.items()
    ]


def _letters(symbols: Mapping[Choice, str]) -> list[str]:
    shifts = [f"{symbol} is {choice}" for choice, symbol in symbols.items() if isinstance(choice, str)]
    return [f"Letters       {', '.join(shifts)}"] if shifts else []


def describe_front(plans: Sequence[BitPlan]) -> str:
    """Size against predicted loss, one plan per line."""
    rows = [
        (
            plan.made_by.budget,
            f"{plan.planes_per_weight:.3f}",
            f"{plan.bits_per_weight:.3f}",
            size(plan.stored_bytes),
            f"{plan.predicted_loss:.4g}",
        )
        for plan in plans
    ]
    return table(("budget", "code bits", "bits/weight", "stored", "predicted loss"), rows)


def _numbers(layers: Sequence[PlannedLayer], bits: Sequence[Choice]) -> tuple[str, str, str]:
    weights = sum(layer.weights for layer in layers)
    planes = sum(bits_of_choice(choice) * layer.weights for layer, choice in zip(layers, bits, strict=True)) / weights
    stored = 8 * sum(layer.bytes[choice] for layer, choice in zip(layers, bits, strict=True)) / weights
    loss = sum(layer.cost[choice] for layer, choice in zip(layers, bits, strict=True))
    return f"{planes:.3f}", f"{stored:.3f}", f"{loss:.4g}"
