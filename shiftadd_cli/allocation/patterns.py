"""Layers selected by patterns: layers with fixed bits, and layers tied to equal bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from shiftadd_cli.bcq.choices import Choice, parse_choice
from shiftadd_cli.errors import AllocationError
from shiftadd_cli.source import LinearSpec
from shiftadd_cli.source.structure import matching_pattern


def pinned_bits(linears: Sequence[LinearSpec], keep: Sequence[str]) -> dict[str, Choice]:
    """Bits, by full name, of the linears matched by `PATTERN=BITS` entries; a pattern may match an enclosing module.

    Raises AllocationError for an entry that is malformed, matches nothing, or contradicts another.
    """
    pinned: dict[str, tuple[Choice, str]] = {}
    for entry in keep:
        pattern, _, word = entry.rpartition("=")
        try:
            choice = parse_choice(word)
        except ValueError:
            choice = 0
        if not pattern or not choice:
            raise AllocationError(
                f"`keep` {entry!r} is not valid; write PATTERN=BITS, such as '*.down_proj=4' or '*.down_proj=shift2'."
            )
        for spec in _matched(linears, [pattern], "`keep`"):
            earlier, other = pinned.setdefault(spec.name, (choice, entry))
            if earlier != choice:
                raise AllocationError(f"`keep` {other!r} and {entry!r} both name {spec.name}; give one of them.")
    return {name: choice for name, (choice, _) in pinned.items()}


def tied_by_pattern(linears: Sequence[LinearSpec], tie: Sequence[str]) -> list[tuple[str, ...]]:
    """For each entry `PATTERN,PATTERN,...` and block, the full names of the linears that match any of its patterns.

    Raises AllocationError for a pattern that is empty or matches nothing.
    """
    groups: list[tuple[str, ...]] = []
    for entry in tie:
        patterns = [pattern.strip() for pattern in entry.split(",")]
        if not all(patterns):
            raise AllocationError(f"`tie` {entry!r} is not valid; write PATTERN,PATTERN, such as '*.q_proj,*.k_proj'.")
        for pattern in patterns:
            _matched(linears, [pattern], "`tie`")
        members = _matched(linears, patterns, "`tie`")
        for block in sorted({spec.block for spec in members}):
            groups.append(tuple(spec.name for spec in members if spec.block == block))
    return groups


def follow_pins(
    allowed: Mapping[str, tuple[Choice, ...]], tied: Iterable[Sequence[str]]
) -> dict[str, tuple[Choice, ...]]:
    """The bits allowed for every layer, after layers tied to a pinned layer take its bits.

    Raises AllocationError for tied layers that are pinned to different bits.
    """
    result = dict(allowed)
    for names in tied:
        pinned = {result[name][0]: name for name in names if len(result[name]) == 1}
        if len(pinned) > 1:
            layers = " and ".join(f"{name} {bits}" for bits, name in pinned.items())
            raise AllocationError(
                f"Layers that must have equal bits are kept at different ones ({layers}); change `keep`, or untie them "
                "(`tie`, `tie_fused=False`)."
            )
        if pinned:
            result |= dict.fromkeys(names, (next(iter(pinned)),))
    return result


def fused(shared_inputs: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Groups of linears that inference engines fuse: those that read one input inside one module (query, key and value;
    gate and up). Linears of attention and feed-forward parts that read the same norm are not fused."""
    groups: dict[tuple[int, str], list[str]] = {}
    for index, names in enumerate(shared_inputs):
        for name in names:
            groups.setdefault((index, name.rpartition(".")[0]), []).append(name)
    return [tuple(names) for names in groups.values() if len(names) > 1]


def _matched(linears: Sequence[LinearSpec], patterns: Sequence[str], option: str) -> list[LinearSpec]:
    members = [spec for spec in linears if matching_pattern(spec.name, patterns)]
    if not members:
        raise AllocationError(
            f"The {option} pattern {patterns[0]!r} matches no layer to quantize; layer names look like "
            f"{linears[-1].name!r}."
        )
    return members
