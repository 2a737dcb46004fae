from __future__ import annotations

import torch
from bcq_problems import generator, quick
from hypothesis import given
from hypothesis import strategies as st

from shiftadd_cli.bcq.packing import (
    pack_nibbles,
    pack_planes,
    unpack_codes,
    unpack_nibbles,
    unpack_planes,
    unpack_signs,
)

shapes = st.tuples(st.lists(st.integers(1, 4), max_size=3), st.integers(1, 35)).map(lambda s: (*s[0], s[1]))


@quick
@given(shapes, st.integers(0, 99))
def test_planes_survive_packing(shape: tuple[int, ...], seed: int) -> None:
    planes = torch.rand(shape, generator=generator(seed)) > 0.5
    packed = pack_planes(planes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape[:-1], -(-shape[-1] // 8))
    assert torch.equal(unpack_planes(packed, shape[-1]), planes)
    signs = unpack_signs(packed, shape[-1])
    assert signs.dtype == torch.float32
    assert torch.equal(signs, planes.float() * 2 - 1)


@quick
@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_lowest_column_is_the_least_significant_bit_and_padding_is_zero(plane: list[bool]) -> None:
    expected = [0] * -(-len(plane) // 8)
    for column, bit in enumerate(plane):
        if bit:
            expected[column // 8] += 2 ** (column % 8)
    assert pack_planes(torch.tensor(plane)).tolist() == expected


@quick
@given(st.integers(1, 4), st.integers(1, 7), st.integers(1, 35), st.integers(0, 99))
def test_codes_survive_packing_as_planes(rows: int, bits: int, columns: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator(seed))
    planes = torch.stack([codes >> bit & 1 for bit in range(bits)], dim=1).bool()
    unpacked = unpack_codes(pack_planes(planes), columns)
    assert unpacked.dtype == torch.int32
    assert torch.equal(unpacked.long(), codes)


def test_planes_pack_from_any_memory_order() -> None:
    planes = torch.rand(13, 5, 9, generator=generator(0)) > 0.5
    turned = planes.permute(2, 1, 0)
    assert torch.equal(pack_planes(turned), pack_planes(turned.contiguous()))


@quick
@given(shapes, st.integers(0, 99))
def test_nibbles_survive_packing(shape: tuple[int, ...], seed: int) -> None:
    nibbles = torch.randint(0, 16, shape, generator=generator(seed))
    packed = pack_nibbles(nibbles)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape[:-1], -(-shape[-1] // 2))
    assert torch.equal(unpack_nibbles(packed, shape[-1]).long(), nibbles)


@quick
@given(st.lists(st.integers(0, 15), min_size=1, max_size=20))
def test_first_nibble_is_the_low_half_and_padding_is_zero(nibbles: list[int]) -> None:
    expected = [0] * -(-len(nibbles) // 2)
    for index, nibble in enumerate(nibbles):
        expected[index // 2] += nibble * (1 if index % 2 == 0 else 16)
    assert pack_nibbles(torch.tensor(nibbles)).tolist() == expected
