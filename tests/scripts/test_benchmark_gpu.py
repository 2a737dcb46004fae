"""scripts/benchmark_gpu.py, as far as it runs without a GPU."""

from __future__ import annotations

from collections.abc import Callable

import benchmark_gpu
import pytest
import torch
from benchmark_gpu import Row, allowed_error, copies_beyond, measure, random_matrix, relative_error
from click.testing import CliRunner
from formats import layout_on

from shiftadd_cli.bcq.grid import ScaleGrid

LAYOUT = layout_on(ScaleGrid.resolve(12, 64, 1, 32), 2, "pot", row_scale=True, offset=False)


def test_missing_gpu_is_reported_with_exit_code_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(benchmark_gpu.main, ["--bits", "2"])
    assert result.exit_code == 2
    assert result.output == "This benchmark needs a CUDA GPU, and torch sees none here.\n"


@pytest.mark.parametrize("arguments", [["--shape", "4096"], ["--shape", "0x8"], ["--group-size", "12"]])
def test_wrong_options_are_named(arguments: list[str]) -> None:
    result = CliRunner().invoke(benchmark_gpu.main, arguments)
    assert result.exit_code == 2
    assert "Invalid value" in result.output


def test_row_states_ratio_and_rate() -> None:
    row = Row("4096x4096", 2, "float16", 1, "gemv", 5.0, 12.5, 5_000_000)
    assert (row.ratio, row.rate) == (2.5, 1000.0)


def test_matrices_exceed_the_cache() -> None:
    assert copies_beyond(50_000_000, 4_000_000) == 50
    assert copies_beyond(50_000_000, 300_000_000) == 2
    assert copies_beyond(50_000_000, 1) == benchmark_gpu.MOST_COPIES


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_check_accepts_the_right_product_and_rejects_one_wrong_weight(dtype: torch.dtype) -> None:
    matrix = random_matrix(LAYOUT, torch.Generator().manual_seed(0)).decode_stored().double()
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = torch.nn.functional.linear(x.float(), matrix.float()).to(dtype)
    assert relative_error(y, x, matrix) <= allowed_error(dtype)
    matrix[3, 5] += 0.1 * matrix.abs().max()
    assert relative_error(y, x, matrix) > allowed_error(dtype)


def test_every_kernel_is_checked_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels are interpreted. A fake clock gives 6 µs for the dense product and 2 µs for the kernels."""
    pytest.importorskip("triton", reason="triton is not installed")
    properties = type("Properties", (), {"L2_cache_size": 500})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def clock(runs: dict[str, tuple[Callable[[], None], int]], rounds: int) -> dict[str, float]:
        for run, products in runs.values():
            assert products >= 2
            run()
        return {name: 6.0 if name == "dense" else 2.0 for name in runs}

    monkeypatch.setattr(benchmark_gpu, "interleaved", clock)
    rows = measure(LAYOUT, torch.float16, (1, 9), 1, True, torch.device("cpu"))
    assert [(row.batch, row.kernel, row.ratio) for row in rows] == [(1, "gemv", 3), (1, "gemm", 3), (9, "gemm", 3)]
    monkeypatch.setattr(benchmark_gpu, "relative_error", lambda *arguments: float("nan"))
    with pytest.raises(SystemExit, match="1"):
        measure(LAYOUT, torch.float16, (1,), 1, True, torch.device("cpu"))
