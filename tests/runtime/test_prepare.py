from __future__ import annotations

import copy
import gc
import io
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import Checkpoint, random_weight, write_checkpoint
from compiled import needs_kernels
from formats import layout_on
from loading import assert_close, assert_same_state, load, logits
from tiny_models import tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from shiftadd_cli.bcq.grid import ScaleGrid
from shiftadd_cli.kernels import select as choice
from shiftadd_cli.kernels.select import Kernel, Precision
from shiftadd_cli.runtime import prepare
from shiftadd_cli.runtime.linear import PackedLinear
from shiftadd_cli.runtime.prepare import prepare_layers


def layer(group_size: int = 16) -> PackedLinear:
    layout = layout_on(ScaleGrid.resolve(40, 64, 1, group_size), 3, "apot2", True, False, rotation=True)
    return PackedLinear.from_weight(random_weight(layout), torch.ones(40))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write_checkpoint(tiny_model("llama"), tmp_path_factory.mktemp("checkpoint"))


def packed_layers(model: torch.nn.Module) -> list[PackedLinear]:
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


@needs_kernels
def test_prepared_layers_compute_the_same_and_store_planes_once() -> None:
    plain, prepared = layer(), layer()
    prepare_layers([prepared])
    x = torch.randn(5, 64)
    torch.testing.assert_close(prepared(x), plain(x), rtol=1e-4, atol=1e-4)
    assert prepared.kernel is Kernel.CPU
    assert prepared.get_parameter("weight_codes").numel() == 0
    assert torch.equal(prepared.decode(), plain.decode())


@needs_kernels
def test_preparation_changes_no_state_dict_and_carries_over_to_copies() -> None:
    plain, prepared = layer(), layer()
    prepare_layers([prepared])
    assert prepared.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in prepared.state_dict().items())
    other = PackedLinear(plain.layout, bias=True)
    prepare_layers([other])
    other.load_state_dict(prepared.state_dict())
    stream = io.BytesIO()
    torch.save(prepared, stream)
    stream.seek(0)
    x = torch.randn(5, 64)
    for twin in (other, copy.deepcopy(prepared), torch.load(stream, weights_only=False)):
        assert twin.kernel is Kernel.CPU
        assert torch.equal(twin(x), prepared(x))


@needs_kernels
def test_inputs_that_kernels_do_not_support_use_the_decoded_matrix() -> None:
    prepared = layer()
    prepare_layers([prepared])
    x = torch.randn(5, 64, requires_grad=True)
    prepared(x).sum().backward()
    torch.testing.assert_close(x.grad, prepared.decode().sum(0).expand(5, -1), rtol=1e-4, atol=1e-4)
    double = prepared(x.detach().double())
    torch.testing.assert_close(double, layer()(x.detach().double()))


@needs_kernels
def test_moves_keep_a_layer_prepared() -> None:
    prepared = layer()
    prepare_layers([prepared])
    before = prepared.decode()
    prepared.to(torch.bfloat16)
    assert prepared.kernel is Kernel.CPU
    assert prepared.bias is not None
    assert prepared.bias.dtype == prepared.weight.dtype == torch.bfloat16
    assert torch.equal(prepared.decode(), before)
    prepared.to("meta")
    assert prepared.kernel is Kernel.REFERENCE
    assert prepared.get_parameter("weight_codes").shape == (40, 3, 8)


@needs_kernels
def test_layers_with_narrow_groups_stay_unprepared() -> None:
    narrow = layer(group_size=8)
    prepare_layers([narrow])
    assert narrow.kernel is Kernel.REFERENCE


@needs_kernels
@pytest.mark.parametrize(("setting", "expected"), [("", Precision.AUTO), ("fast", Precision.FAST)])
def test_loaded_models_are_prepared(
    checkpoint: Checkpoint, setting: str, expected: Precision, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SHIFTADD_PRECISION", setting)
    model = load(checkpoint.folder)
    assert {packed.precision for packed in packed_layers(model)} == {expected}
    assert_close(logits(model), logits(checkpoint.dense), eps=1e-3)
    model.save_pretrained(tmp_path / "again")
    assert_same_state(load(tmp_path / "again"), model)
    dense = model.dequantize()
    assert not packed_layers(dense)
    assert_close(logits(dense), logits(checkpoint.dense))


def test_reference_can_be_requested(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHIFTADD_KERNEL", "reference")
    assert not any(packed.kernel is Kernel.CPU for packed in packed_layers(load(checkpoint.folder)))


def test_missing_kernels_are_reported_once(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in (prepare, choice):
        monkeypatch.setattr(module, "cpu_extension", lambda: None)
    monkeypatch.setattr(prepare, "_said", set())
    with caplog.at_level(logging.WARNING, logger="shiftadd_cli"):
        model = load(checkpoint.folder)
        load(checkpoint.folder)
    assert [record.message for record in caplog.records if "C++ compiler" in record.message] == [
        caplog.records[0].message
    ]
    assert_close(logits(model), logits(checkpoint.dense))


def test_triton_can_be_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton runs in its interpreter, on the CPU (tests/conftest.py)."""
    pytest.importorskip("triton")
    monkeypatch.setenv("SHIFTADD_KERNEL", "triton")
    plain, prepared = layer(), layer()
    prepare_layers([prepared])
    assert prepared.kernel is Kernel.TRITON
    x = torch.randn(2, 64)
    torch.testing.assert_close(prepared(x), plain(x), rtol=1e-4, atol=1e-4)
    assert torch.equal(copy.deepcopy(prepared)(x), prepared(x))
    monkeypatch.setenv("SHIFTADD_KERNEL", "reference")
    prepared.to(torch.float32)
    assert prepared.kernel is Kernel.REFERENCE


def small_llama(vocabulary: int, *, tied: bool) -> LlamaForCausalLM:
    sizes: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=tied, **sizes)
    config.architectures = ["LlamaForCausalLM"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def is_mapped(folder: Path) -> bool:
    gc.collect()
    return str(folder) in Path("/proc/self/maps").read_text()


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tables", [True, False])
def test_loaded_model_keeps_no_file_in_memory_that_it_hardly_reads(tmp_path: Path, tables: bool, tied: bool) -> None:
    write_checkpoint(small_llama(32, tied=tied), tmp_path, tables=tables)
    model = load(tmp_path)
    assert not is_mapped(tmp_path)
    states = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(torch.arange(8)[None]).logits
    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(bytes(file.stat().st_size))
    assert all(torch.equal(tensor, states[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(torch.arange(8)[None]).logits, expected)


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_dense_weights_that_fill_a_file_stay_mapped(tmp_path: Path) -> None:
    write_checkpoint(small_llama(4096, tied=True), tmp_path)
    model = load(tmp_path)
    assert is_mapped(tmp_path)
    del model
    assert not is_mapped(tmp_path)
