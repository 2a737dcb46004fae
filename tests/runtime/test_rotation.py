from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from artifacts import random_weight
from formats import layout_on
from torch import Tensor, nn

from shiftadd_cli.bcq.grid import ScaleGrid
from shiftadd_cli.bcq.rotation import random_signs, rotate_input
from shiftadd_cli.bcq.weight import QuantizedWeight
from shiftadd_cli.runtime import rotation
from shiftadd_cli.runtime.linear import PackedLinear
from shiftadd_cli.runtime.rotation import SharedRotation, share_rotations

SIGNS = random_signs(32, seed=0)


@pytest.fixture
def rotations(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs that are actually rotated, in order."""
    inputs: list[Tensor] = []
    real = rotation.rotate

    def counted(x: Tensor, signs: Tensor) -> Tensor:
        inputs.append(x)
        return real(x, signs)

    monkeypatch.setattr(rotation, "rotate", counted)
    return inputs


def layer(rows: int, seed: int, rotated: bool = True) -> PackedLinear:
    weight = random_weight(layout_on(ScaleGrid.resolve(rows, 32, 1, 16), 2, "pot", True, False, rotated), seed)
    tensors = dict(weight.tensors)
    if rotated:
        tensors["weight_signs"] = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
    return PackedLinear.from_weight(QuantizedWeight(weight.layout, tensors))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.other, self.plain = layer(8, 0), layer(4, 1), layer(4, 2), layer(4, 3, rotated=False)
        self.other.get_parameter("weight_signs").data += 1


def test_layers_that_share_an_input_rotate_it_once(rotations: list[Tensor]) -> None:
    block = nn.Sequential(Attention())
    before = [linear(torch.ones(3, 32)) for linear in block[0].children()]
    share_rotations(block)
    x = torch.ones(3, 32)
    after = [linear(x) for linear in block[0].children()]
    assert len(rotations) == 1, "q and k share signs, other rotates by itself"
    for one, two in zip(before, after, strict=True):
        torch.testing.assert_close(one, two)


def test_changed_or_new_input_is_rotated_again(rotations: list[Tensor]) -> None:
    shared, x = SharedRotation(), torch.ones(2, 32)
    assert shared(x, SIGNS) is shared(x, SIGNS)
    x += 1
    torch.testing.assert_close(shared(x, SIGNS), rotate_input(x, SIGNS))
    shared(x.clone(), SIGNS)
    assert len(rotations) == 3


def test_gradients_follow_the_current_mode() -> None:
    shared, x = SharedRotation(), torch.ones(2, 32, requires_grad=True)
    with torch.no_grad():
        assert not shared(x, SIGNS).requires_grad
    shared(x, SIGNS).sum().backward()
    assert x.grad is not None


def test_inference_mode_works_without_caching(rotations: list[Tensor]) -> None:
    shared = SharedRotation()
    with torch.inference_mode():
        x = torch.ones(2, 32)
        assert torch.equal(shared(x, SIGNS), shared(x, SIGNS))
    assert len(rotations) == 2


def test_result_is_freed_with_its_input() -> None:
    shared, x = SharedRotation(), torch.ones(2, 32)
    result = weakref.ref(shared(x, SIGNS))
    gc.collect()
    assert result() is not None
    del x
    gc.collect()
    assert result() is None


def test_copies_share_no_rotation() -> None:
    block = Attention()
    share_rotations(block)
    x = torch.ones(3, 32)
    block.q(x)
    twin = copy.deepcopy(block)
    assert twin.q.rotate is twin.k.rotate
    assert twin.q.rotate is not block.q.rotate
    assert torch.equal(twin.q(x), block.q(x))
