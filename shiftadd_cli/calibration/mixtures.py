"""Calibration order of a block's linears by their inputs, with the experts of a mixture side by side.

Experts are alike: if gate and up of one expert read the same tensor and down reads their product, this holds for all
experts, even for those that receive no token of the first batch. The input of an expert does not depend on the other
experts, so all of them are calibrated in one pass, as far as memory allows; separate passes would number hundreds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shiftadd_cli.source import LinearSpec

Group = tuple[str, ...]

# Upper limit for the moments of experts gathered at once, with all their copies; one expert always fits.
ROOM_BYTES = 1 << 31
# Copies of a moment: the sum of a shard, the sum of all shards, and finally the moment itself.
COPIES = 3


def in_turns(groups: Sequence[Group], specs: Sequence[LinearSpec]) -> list[list[Group]]:
    """The groups of `BlockStream.shared_inputs`, by turn. Each group has its own turn, except that the groups of a
    mixture with the same projections share one, for all of its experts.

    specs: for all linears of the block.
    """
    by_kind = {spec.kind: spec for spec in specs}
    turns: list[list[Group]] = []
    # Mixture and projections of each shared turn.
    shared: dict[int, tuple[str, set[str]]] = {}
    for group in groups:
        mixture = by_kind[group[0]].experts
        if mixture is None:
            turns.append([group])
            continue
        projections = {_projection(by_kind[kind]) for kind in group}
        same = (others for owner, others in shared.values() if owner == mixture and others & projections)
        if (turn_projections := next(same, None)) is not None:
            turn_projections |= projections
        else:
            shared[len(turns)] = (mixture, projections)
            turns.append([])
    for turn, (mixture, projections) in shared.items():
        members: dict[str, list[str]] = {}
        for spec in specs:
            if spec.experts == mixture and _projection(spec) in projections:
                members.setdefault(spec.kind.rpartition(".")[0], []).append(spec.kind)
        turns[turn] = [tuple(kinds) for kinds in members.values()]
    return turns


def in_room(groups: Sequence[Group], specs: Sequence[LinearSpec], *, cross: bool) -> Iterator[list[Group]]:
    """Split the groups into parts, in order, each with up to `ROOM_BYTES` of expert moments; other groups do not count.

    cross: whether cross moments are also gathered.
    """
    by_kind = {spec.kind: spec for spec in specs}
    part: list[Group] = []
    used = 0
    for group in groups:
        spec = by_kind[group[0]]
        own = 0 if spec.experts is None else expert_bytes(spec.in_features, cross=cross)
        if part and own and used + own > ROOM_BYTES:
            yield part
            part, used = [], 0
        part.append(group)
        used += own
    if part:
        yield part


def enough_tokens(spec: LinearSpec, tokens: int) -> bool:
    """Whether a linear that read `tokens` tokens is calibrated on them; an expert needs at least one token per input.

    With fewer tokens, the moment misses some directions and overstates others. Measured on up and down projections of
    blocks 3 and 20 of SmolLM2-135M, at 3 bits and on tokens of other windows, relative to a fit on weights alone: with
    half as many tokens as inputs the output error was 0.71 to 1.59 times as large (geometric mean 1.07), with as many
    tokens 0.53 to 1.32 times (0.83), and with twice as many 0.39 to 0.95 times (0.60).
    """
    return tokens > 0 and (spec.experts is None or tokens >= spec.in_features)


def expert_bytes(width: int, *, cross: bool) -> int:
    """Bytes needed to gather the moments of one expert's input with `width` features."""
    return 4 * COPIES * (1 + cross) * width**2


def _projection(spec: LinearSpec) -> str:
    return spec.kind.rpartition(".")[2]
