"""Layers selected by patterns: pinned, tied and fused."""

from __future__ import annotations

import pytest

from shiftadd_cli.allocation.patterns import follow_pins, fused, pinned_bits, tied_by_pattern
from shiftadd_cli.bcq.choices import Choice
from shiftadd_cli.errors import AllocationError
from shiftadd_cli.source import LinearSpec

KINDS = ("attn.q", "attn.k", "mlp.up", "mlp.down")
LINEARS = [LinearSpec(f"h.{block}.{kind}", kind, block, 8, 8, False, False) for block in range(2) for kind in KINDS]


def test_patterns_pin_layers_and_modules() -> None:
    assert pinned_bits(LINEARS, ["*.down=4", "h.0.attn=3"]) == {
        "h.0.mlp.down": 4,
        "h.1.mlp.down": 4,
        "h.0.attn.q": 3,
        "h.0.attn.k": 3,
    }
    assert pinned_bits(LINEARS, ["*.up=shift2", "h.0.mlp.up=shift2-4"]) == {
        "h.0.mlp.up": "shift2-4",
        "h.1.mlp.up": "shift2-4",
    }
    assert pinned_bits(LINEARS, ["*.q=2", "h.0.attn.q=2"]) == {"h.0.attn.q": 2, "h.1.attn.q": 2}


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (["*.down"], "PATTERN=BITS"),
        (["=3"], "PATTERN=BITS"),
        (["*.down=9"], "PATTERN=BITS"),
        (["*.down=x"], "PATTERN=BITS"),
        (["*.down=shift1-9"], "PATTERN=BITS"),
        (["*.q=3", "h.0=shift1-3"], "both name h.0.attn.q"),
        (["*.nothing=3"], "matches no layer"),
        (["*.q=2", "h.0=3"], "both name h.0.attn.q"),
    ],
)
def test_entries_that_pin_no_layer_or_one_twice_are_refused(keep: list[str], message: str) -> None:
    with pytest.raises(AllocationError) as caught:
        pinned_bits(LINEARS, keep)
    assert message in str(caught.value)


def test_ties_stay_inside_a_block() -> None:
    assert tied_by_pattern(LINEARS, ["*.q, *.down"]) == [
        ("h.0.attn.q", "h.0.mlp.down"),
        ("h.1.attn.q", "h.1.mlp.down"),
    ]
    assert tied_by_pattern(LINEARS, ["h.1.mlp"]) == [("h.1.mlp.up", "h.1.mlp.down")]


@pytest.mark.parametrize("entry", ["*.q,", "", "*.q,*.nothing"])
def test_ties_without_a_layer_are_refused(entry: str) -> None:
    with pytest.raises(AllocationError, match="`tie`"):
        tied_by_pattern(LINEARS, [entry])


def test_linears_of_two_modules_are_not_fused() -> None:
    """Phi's attention and feed-forward parts read the same norm."""
    shared = [("h.0.attn.q", "h.0.attn.k", "h.0.mlp.up"), ("h.0.mlp.down",), ("h.1.attn.q", "h.1.attn.k")]
    assert fused(shared) == [("h.0.attn.q", "h.0.attn.k"), ("h.1.attn.q", "h.1.attn.k")]


def test_tied_layers_follow_the_pinned_one() -> None:
    allowed: dict[str, tuple[Choice, ...]] = {"a": (2, 3), "b": (5,), "c": (2, 3), "d": (5,)}
    assert follow_pins(allowed, [("a", "b", "d")]) == {"a": (5,), "b": (5,), "c": (2, 3), "d": (5,)}
    with pytest.raises(AllocationError, match="b 5 and c 3"):
        follow_pins(allowed | {"c": (3,)}, [("b", "c")])
