"""Vision models of every family, from the checkpoint to the packed model and its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_vision import VISION_FAMILIES, save_pictures, save_tiny_vision

import shiftadd_cli
from shiftadd_cli.blockwise.forward import predict
from shiftadd_cli.source import open_source

QUICK: dict[str, Any] = {
    "samples": 6,
    "batch_size": 4,
    "group_size": 16,
    "fit_rounds": 1,
    "refine_rounds": 1,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pictures(tmp_path_factory.mktemp("data") / "pictures", 12, layout="folders")


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_packed_and_decoded_models_predict_alike(family: str, tmp_path: Path, pictures: Path) -> None:
    source = save_tiny_vision(family, tmp_path / "model")
    report = shiftadd_cli.quantize(str(source), tmp_path / "out", bits=3, calibration=str(pictures), **QUICK)
    assert report.calibration is not None
    assert report.calibration.image_shape == (3, 16, 16)
    assert report.calibration.seq_len is None
    assert all(layer.calibrated for layer in report.layers)
    assert report.machine.expected_memory_bytes > 0
    settings = "preprocessor_config.json"
    assert (tmp_path / "out" / settings).read_bytes() == (source / settings).read_bytes()
    packed, dense = (shiftadd_cli.load(tmp_path / "out", dtype=torch.float32) for _ in range(2))
    assert type(packed).__name__ == json.loads((source / "config.json").read_text())["architectures"][0]
    dense = dense.dequantize()
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        prediction, expected = predict(packed, pixels), predict(dense, pixels)
        original = predict(open_source(str(source)).load_model(), pixels)
    assert torch.isfinite(expected.values).all()
    torch.testing.assert_close(prediction.values, expected.values, rtol=1e-3, atol=1e-4)
    # Three planes change the predictions, but only in part.
    cosine = torch.cosine_similarity(expected.values, original.values, dim=-1)
    assert 0.5 < cosine.min() < cosine.max() < 0.99999
    # The convolution of the patches and the classifiers are stored as 8-bit rows.
    assert any("classifier" in table.modules[0] for table in report.tables) == prediction.is_logits
    assert not {"classifier", "patch embedding"} & {module.reason for module in report.kept}
    weights = open_source(str(source)).load_model()
    for table in report.tables:
        (name,) = table.modules
        weight = weights.get_parameter(f"{name}.weight")
        assert (table.rows, table.columns) == (len(weight), weight[0].numel())
        scale = weight.flatten(1).abs().amax(1) / 127
        error = (dense.get_parameter(f"{name}.weight") - weight).flatten(1).abs().amax(1)
        # Half a step, plus the error at the ends from rounding the scale to bfloat16.
        assert (error <= scale * (0.5 + 127 * 2**-8)).all()
        assert 0 < table.weight_error < 1e-4
