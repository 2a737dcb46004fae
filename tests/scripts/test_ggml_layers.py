from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from benchmark_kernels import main
from click.testing import CliRunner
from ggml_layers import FORMATS, GgmlLayers, GgmlLibrary

LIBRARY = os.environ.get("SHIFTADD_GGML_LIBRARY")
needs_ggml = pytest.mark.skipif(not LIBRARY, reason="SHIFTADD_GGML_LIBRARY names no library built from scripts/ggml")


def test_file_that_is_not_a_library_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "libggml_matmul.so"
    path.write_bytes(b"no library")
    result = CliRunner().invoke(main, ["--ggml", str(path)])
    assert result.exit_code == 2
    assert "build it as scripts/ggml/CMakeLists.txt says" in " ".join(result.stderr.split())


@needs_ggml
@pytest.mark.parametrize("repack", [False, True])
@pytest.mark.parametrize("kind", FORMATS.values())
def test_product_matches_the_weight_within_its_bits(kind: str, repack: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(64, 512, generator=generator), torch.randn(3, 512, generator=generator)
    try:
        layers = GgmlLayers(GgmlLibrary(Path(str(LIBRARY))), kind, weight, x, copies=2, threads=2, repack=repack)
    except ValueError:
        assert repack, "every format has the plain layout"
        pytest.skip(f"ggml has no layout of its own for {kind} here")
    with layers:
        layers.run()
        expected, product = x @ weight.T, layers.result()
        assert layers.nbytes * 8 < 5 * weight.numel()
    # Two to four bits change normal weights by a tenth to a third. A wrong layout is off by more than 1.
    assert (product - expected).norm() / expected.norm() < 0.4


@needs_ggml
def test_columns_that_are_not_a_multiple_of_a_block_are_refused() -> None:
    with pytest.raises(ValueError, match="q2_K weights of 8 x 100"):
        GgmlLayers(
            GgmlLibrary(Path(str(LIBRARY))),
            "q2_K",
            torch.zeros(8, 100),
            torch.zeros(1, 100),
            copies=1,
            threads=1,
            repack=False,
        )
