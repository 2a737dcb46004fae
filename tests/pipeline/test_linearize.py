"""`linearize`: which layers become linear, what is written, and what is refused before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import write_checkpoint
from tiny_models import save_tiny, tiny_model, tiny_tokenizer
from transformers import DynamicCache

import shiftadd_cli
from shiftadd_cli.artifact.folder import Artifact
from shiftadd_cli.artifact.verify import verify
from shiftadd_cli.errors import ArtifactError, ExportError, LinearAttentionError, OutputError, RecipeError, SourceError
from shiftadd_cli.export.dense import export_dense
from shiftadd_cli.pipeline.linearize import Linearized, LinearizeJob
from shiftadd_cli.pipeline.linearize_settings import LinearizeSettings
from shiftadd_cli.runtime.linear_attention.module import LinearAttention
from shiftadd_cli.source import open_source

SMALL: dict[str, Any] = {"window": 8, "sinks": 2, "samples": 4, "seq_len": 64, "steps": 5, "context": 200}


def linearize(model: Path, out: Path, **settings: Any) -> Linearized:
    return LinearizeJob.prepare(str(model), out, LinearizeSettings(**(SMALL | settings)), overwrite=True).run()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers of softmax attention over all tokens."""
    return save_tiny("qwen3", tmp_path_factory.mktemp("models") / "qwen3")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed model whose blocks decode in one native call."""
    folder = write_checkpoint(tiny_model("llama"), tmp_path_factory.mktemp("models") / "packed", tables=True).folder
    tiny_tokenizer().save_pretrained(folder)
    return folder


def linear_layers(model: Any) -> list[int]:
    return [module.layer_idx for module in model.modules() if isinstance(module, LinearAttention)]


@pytest.mark.parametrize("name", ["exp", "angular", "binary", "window"])
@torch.no_grad()
def test_the_folder_loads_and_decodes_as_it_prefills(original: Path, tmp_path: Path, name: str) -> None:
    result = linearize(original, tmp_path / "out", map=name, layers="0,2")
    assert result.chosen == (0, 2)
    model = shiftadd_cli.load(tmp_path / "out")
    assert linear_layers(model) == [0, 2]
    verify(Artifact.open(tmp_path / "out"))
    ids = torch.randint(3, 300, (1, 150), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache(config=model.config)
    parts = [model(part, past_key_values=cache).logits for part in ids.split([100, *[1] * 50], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_compressed_model_stays_compressed(packed: Path, tmp_path: Path) -> None:
    linearize(packed, tmp_path / "out", layers="1")
    before, after = Artifact.open(packed), Artifact.open(tmp_path / "out")
    assert (after.layouts, after.tables) == (before.layouts, before.tables)
    verify(after)
    model = shiftadd_cli.load(tmp_path / "out")
    assert linear_layers(model) == [1]
    ids = torch.randint(3, 300, (1, 120), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache(config=model.config)
    parts = [model(part, past_key_values=cache).logits for part in ids.split([70, 8, *[1] * 42], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, rtol=1e-3, atol=1e-4)
    # The result differs from the softmax model beyond the window, and only there.
    softmax = shiftadd_cli.load(packed)(ids).logits
    torch.testing.assert_close(model(ids).logits[:, :10], softmax[:, :10], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(ids).logits[:, 60:], softmax[:, 60:], rtol=1e-4)


def test_a_layer_learns_to_be_like_the_original(original: Path, tmp_path: Path) -> None:
    forgets, fitted = (
        linearize(original, tmp_path / "out", map=name, layers="all", steps=60) for name in ("window", "exp")
    )
    assert fitted.divergence < forgets.divergence
    assert all(row.fit.error < row.fit.window_error for row in fitted.layers)


def test_a_budget_takes_the_layers_that_cost_least(original: Path, tmp_path: Path) -> None:
    result = linearize(original, tmp_path / "out", cache_budget="80%")
    alone = {row.layer: row.divergence for row in result.layers}
    (chosen,) = result.chosen
    assert alone[chosen] == min(alone.values(), key=float)  # type: ignore[arg-type]
    assert result.cache_bytes <= 0.8 * result.original_cache_bytes
    # Keys and values of 200 tokens, two heads of 16 numbers, in float32, for three layers.
    assert result.original_cache_bytes == 3 * 2 * 200 * 2 * 16 * 4
    assert json.loads((tmp_path / "out" / "linear_attention.json").read_text())["divergence"] == result.divergence


def test_a_limit_on_the_divergence_holds_for_all_layers_together(original: Path, tmp_path: Path) -> None:
    everything = linearize(original, tmp_path / "all", layers="all").divergence
    result = linearize(original, tmp_path / "out", max_divergence=0.7 * everything)
    assert result.divergence <= 0.7 * everything
    assert 0 < len(result.chosen) < 3
    with pytest.raises(LinearAttentionError, match="No linear layers keep to a divergence of 1e-12"):
        linearize(original, tmp_path / "none", max_divergence=1e-12)


def test_the_same_settings_give_the_same_bytes(original: Path, tmp_path: Path) -> None:
    for name in ("one", "other"):
        linearize(original, tmp_path / name, layers="1")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"map": "cosine"}, "`map` 'cosine' is not known"),
        ({"window": 0}, "`window` 0 is not valid; give at least 1"),
        ({"seq_len": 10}, "have no tokens beyond 8 nearest ones"),
        ({"cache_budget": "half"}, "`cache_budget` 'half' is not valid"),
        ({"max_divergence": 0.0}, "`max_divergence` 0.0 is not valid"),
        ({"layers": "first"}, "`layers` 'first' is not valid"),
        ({"layers": "0,2-1"}, "`layers` '0,2-1' is not valid"),
        ({"layers": "0-5"}, r"Layer 3 \(`layers`\) has no attention that can be linear; those that have: 0, 1, 2"),
    ],
)
def test_settings_that_are_not_valid_are_refused(
    original: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        linearize(original, tmp_path / "out", **settings)
    assert not list(tmp_path.iterdir())


def test_a_cache_that_is_too_small_is_refused(original: Path, tmp_path: Path) -> None:
    with pytest.raises(LinearAttentionError, match="With all layers linear, the cache at 200 tokens is larger"):
        linearize(original, tmp_path / "out", cache_budget="2%")


@pytest.mark.parametrize(
    ("family", "message"),
    [("gpt2", "standard way"), ("mistral", "does not keep all tokens"), ("mamba", "no attention layers")],
)
def test_other_architectures_are_refused(tmp_path: Path, family: str, message: str) -> None:
    model = save_tiny(family, tmp_path / family)
    with pytest.raises(LinearAttentionError, match=message):
        linearize(model, tmp_path / "out")


def test_layers_with_a_sliding_window_stay_as_they_are(tmp_path: Path) -> None:
    model = save_tiny("gemma3", tmp_path / "gemma3")
    assert linearize(model, tmp_path / "out", layers="all").chosen == (1,)


def test_an_existing_folder_is_refused(original: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="exists and is not empty"):
        LinearizeJob.prepare(str(original), tmp_path, LinearizeSettings(**SMALL))


def test_a_linear_model_is_no_source(original: Path, tmp_path: Path) -> None:
    linearize(original, tmp_path / "out", layers="0")
    with pytest.raises(LinearAttentionError, match="has linear attention already"):
        linearize(tmp_path / "out", tmp_path / "again")
    with pytest.raises(SourceError, match="compress the original, and then run `shiftadd linearize`"):
        open_source(str(tmp_path / "out"))
    with pytest.raises(ExportError, match="has linear attention"):
        export_dense(tmp_path / "out", tmp_path / "dense")
    with pytest.raises(ArtifactError, match="no dense form"):
        shiftadd_cli.load(tmp_path / "out").dequantize()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"map": "cosine"}, "linear_attention.map = 'cosine'"),
        ({"window": 0}, "linear_attention.window = 0"),
        ({"sinks": True}, "linear_attention.sinks = True"),
        ({"modules": {}}, "linear_attention.modules = {}"),
        ({"modules": {"model.layers.0.self_attn": {"heads": [4, 3, 16]}}}, "not valid"),
        ({"modules": {"model.layers.0.self_attn": {"heads": [4, 2, 8]}}}, "of another shape"),
        ({"modules": {"model.layers.7.self_attn": {"heads": [4, 2, 16]}}}, "no such module"),
        ({"modules": {"model.layers.1.self_attn": {"heads": [4, 2, 16]}}}, "lacks the tensor model.layers.1"),
    ],
)
def test_damaged_entries_are_refused_on_loading(
    original: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    linearize(original, tmp_path / "out", layers="0", steps=0)
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["linear_attention"] |= change
    file.write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=message):
        shiftadd_cli.load(tmp_path / "out")
