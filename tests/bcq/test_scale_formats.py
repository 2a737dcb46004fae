from __future__ import annotations

import pytest
import torch
from bcq_problems import generator, quick
from hypothesis import given
from hypothesis import strategies as st

from shiftadd_cli.bcq.scale_formats import OFFSET_STEP, decode_offsets, encode_offsets, scale_format

SUMS = ("pot", "apot2", "apot3")


def scalar_value(code: int, terms: int) -> float:
    """The ratio of a code, by the formula in the docstring of `scale_formats`; every value is exact in a float."""
    exponent = code & 15
    if exponent == 15:
        return 0.0
    value, term_exponent = 2.0**-exponent, exponent
    for k in range(1, terms):
        nibble = code >> 4 * k & 15
        distance = nibble & 7
        term_exponent += distance
        if distance:
            value += (-1.0 if nibble & 8 else 1.0) * 2.0**-term_exponent
    return value


@pytest.mark.parametrize(("name", "terms"), [("pot", 1), ("apot2", 2), ("apot3", 3)])
def test_every_code_decodes_to_the_formula(name: str, terms: int) -> None:
    form = scale_format(name)
    codes = torch.arange(16**terms)
    assert form.decode(codes).double().tolist() == [scalar_value(code, terms) for code in range(16**terms)]


@pytest.mark.parametrize("name", SUMS)
def test_every_representable_value_survives_exactly(name: str) -> None:
    form = scale_format(name)
    all_values = form.decode(torch.arange(16**form.nibbles))
    assert torch.equal(form.decode(form.encode(all_values)), all_values)
    assert torch.equal(form.round(all_values), all_values)
    assert sorted(set(all_values.tolist())) == form.values.tolist()


@pytest.mark.parametrize("name", SUMS)
def test_zero_is_exact(name: str) -> None:
    form = scale_format(name)
    code = form.encode(torch.zeros(1))
    assert int(code) & 15 == 15
    assert float(form.decode(code)) == 0.0
    assert float(form.values[0]) == 0.0


def test_minus_signs_survive() -> None:
    for name in ("apot2", "apot3"):
        form = scale_format(name)
        for value in (0.75, 1 - 2**-5, 2**-6 - 2**-13):
            ratio = torch.tensor([value])
            assert float(form.decode(form.encode(form.round(ratio)))) == value
    with_two = torch.tensor([1 - 2**-4 - 2**-7, 1 - 2**-4 + 2**-7])
    form = scale_format("apot3")
    assert torch.equal(form.decode(form.encode(form.round(with_two))), with_two)


@pytest.mark.parametrize("name", SUMS)
@quick
@given(
    ratios=st.lists(st.floats(-0.5, 3.0, width=32) | st.floats(0, 2**-10, width=32), min_size=1, max_size=50),
    seed=st.integers(0, 99),
)
def test_rounding_finds_the_nearest(name: str, ratios: list[float], seed: int) -> None:
    form = scale_format(name)
    drawn = torch.tensor(ratios, dtype=torch.float32)
    spread = torch.exp2(-16 * torch.rand(200, generator=generator(seed)))
    for x in (drawn, spread, drawn.view(1, -1).expand(3, -1)):
        rounded = form.round(x)
        assert rounded.shape == x.shape
        assert torch.isin(rounded, form.values).all()
        nearest = (x.double().unsqueeze(-1) - form.values.double()).abs().amin(-1)
        assert torch.equal((x.double() - rounded.double()).abs(), nearest)
        assert [form.round_one(ratio) for ratio in x.flatten().tolist()] == rounded.flatten().tolist()


def test_half_precision_rounds_clamps_and_keeps_zero() -> None:
    form = scale_format("float")
    ratios = torch.tensor([0.0, -0.25, 1.0, 0.3333333, 1e9, 65504.0])
    expected = torch.tensor([0.0, 0.0, 1.0, float(torch.tensor(0.3333333).half()), 65504.0, 65504.0])
    assert torch.equal(form.round(ratios), expected)
    assert [form.round_one(ratio) for ratio in ratios.tolist()] == expected.tolist()


def test_longer_sums_are_finer_formats() -> None:
    x = torch.exp2(-10 * torch.rand(2000, generator=generator(3)))
    errors = [float(((scale_format(name).round(x) - x) / x).square().mean().sqrt()) for name in SUMS]
    assert errors[0] < 0.2
    assert errors[1] < errors[0] / 3
    assert errors[2] < errors[1] / 3


def test_offsets_are_twos_complement_eighths() -> None:
    multiples = torch.arange(-8, 8).float()
    nibbles = encode_offsets(multiples)
    assert nibbles.dtype == torch.uint8
    assert nibbles.tolist() == [n % 16 for n in range(-8, 8)]
    assert torch.equal(decode_offsets(nibbles), multiples * OFFSET_STEP)


def test_the_offset_limit_is_reached_by_both_signs() -> None:
    assert scale_format("apot2").offset_limit == 7 / 8
    assert scale_format("float").offset_limit == float("inf")


def test_tables_are_usable_when_first_built_under_the_meta_device() -> None:
    """transformers builds models under that device, and there the first packed layer may ask for its format."""
    scale_format.cache_clear()
    with torch.device("meta"):
        formats = [scale_format(name) for name in ("pot", "apot2", "apot3", "float")]
    assert all(form.table.device.type == "cpu" for form in formats)
    assert formats[0].decode(torch.tensor([1])).item() == 0.5
