"""Decoders with unusual architectures through whole runs: Gemma 3n and 4, Zamba 2, Mamba, Jamba, Falcon, Llama 4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stopped_runs import contents, counting_text, stopped
from tiny_models import UNUSUAL, save_tiny
from transformers import AutoModelForCausalLM, PreTrainedModel

import shiftadd_cli
from shiftadd_cli.artifact.folder import Artifact
from shiftadd_cli.artifact.verify import verify
from shiftadd_cli.cli.describe import describe_plan
from shiftadd_cli.errors import SourceError
from shiftadd_cli.export.dense import export_dense
from shiftadd_cli.pipeline.plan import make_plan
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.source import open_source

TOKENS = torch.randint(3, 256, (2, 24), generator=torch.Generator().manual_seed(0))
QUICK: dict[str, Any] = {
    "recipe": "equal-bits", "samples": 6, "seq_len": 40, "batch_size": 2, "group_size": 16, "fit_rounds": 1,
    "refine_rounds": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(counting_text(tmp_path_factory.mktemp("text") / "text.txt"))


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


def load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


@pytest.mark.parametrize("family", UNUSUAL)
def test_checkpoint_computes_what_its_dense_export_computes(tmp_path: Path, text: str, family: str) -> None:
    source, out = save_tiny(family, tmp_path / "source"), tmp_path / "out"
    report = shiftadd_cli.quantize(source, out, calibration=text, bits=8, embedding_bits=16, **QUICK)
    verify(Artifact.open(out))
    packed = load(out)
    export_dense(out, tmp_path / "dense")
    dense = load(tmp_path / "dense")
    assert bool(torch.isfinite(logits(packed)).all())
    torch.testing.assert_close(logits(packed), logits(dense), rtol=1e-4, atol=1e-4)
    # Eight bits keep the model close to the original. Wrong inputs or weights would not.
    original = logits(load(source))
    assert float((logits(packed) - original).norm() / original.norm()) < 0.3
    assert type(packed) is type(load(source))
    assert {layer.name for layer in report.layers if not layer.calibrated} <= {
        layer.name for layer in report.layers if "adapter" in layer.name or "experts" in layer.name
    }


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("gemma3n", {"loss_aware": 0.5, "reconstruct_epochs": 1, "distill_epochs": 1}),
        ("gemma4", {"avg_bits": 7.0}),
        ("gemma4", {"true_sequential": False}),
        ("zamba2", {"loss_aware": 0.5, "reconstruct_epochs": 1}),
        ("zamba2", {"avg_bits": 7.0}),
        ("llama4", {"avg_bits": 7.0, "loss_aware": 0.5}),
    ],
    ids=str,
)
def test_every_way_to_calibrate_resumes_to_the_same_bytes(
    tmp_path: Path, text: str, family: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHIFTADD_CACHE", str(tmp_path / "cache"))
    source, settings = save_tiny(family, tmp_path / "source"), QUICK | fields | {"calibration": text}
    shiftadd_cli.quantize(source, tmp_path / "whole", **settings)
    stopped(monkeypatch, 3, source, tmp_path / "out", **settings)
    shiftadd_cli.quantize(source, tmp_path / "out", **settings)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_linears_shared_by_blocks_are_stored_and_computed_once(tmp_path: Path, text: str) -> None:
    source = save_tiny("zamba2", tmp_path / "source")
    report = shiftadd_cli.quantize(source, tmp_path / "out", calibration=text, **QUICK)
    shared = [layer.name for layer in report.layers if "shared_transformer" in layer.name]
    assert shared
    assert {name.split(".")[2] for name in shared} == {"1"}
    packed, (attention, *others) = load(tmp_path / "out"), (1, 3, 5)
    layers = packed.model.layers
    for other in others:
        first, again = (layers[number].shared_transformer.self_attn.q_proj for number in (attention, other))
        assert again is first
    before = logits(packed)
    dense = packed.dequantize()
    torch.testing.assert_close(logits(dense), before, rtol=1e-4, atol=1e-4)
    dense.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(dense))


def test_shared_weights_cannot_be_distilled(tmp_path: Path) -> None:
    source = open_source(str(save_tiny("zamba2", tmp_path)))
    with pytest.raises(SourceError, match=r"share weights.*`distill_epochs=0`"):
        make_plan(source, Recipe.load("equal-bits", {"distill_epochs": 1}))


@pytest.mark.parametrize("family", ["mamba", "jamba"])
def test_linears_read_by_other_code_are_kept_and_named_in_the_plan(tmp_path: Path, family: str) -> None:
    plan = make_plan(open_source(str(save_tiny(family, tmp_path))), Recipe.load("equal-bits", {}))
    names = [name for name, reason in plan.kept_modules if reason == "weight read by other code"]
    assert names
    assert all(name.endswith(".dt_proj") for name in names)
    assert f"{len(names)} x weight read by other code" in describe_plan(plan)


def test_mostly_uncompressed_model_needs_allow_partial(tmp_path: Path) -> None:
    source = open_source(str(save_tiny("dbrx", tmp_path)))
    with pytest.raises(SourceError, match=r"Only \d+% of the weights of DbrxForCausalLM.*`allow_partial=True`"):
        make_plan(source, Recipe.load("equal-bits", {}))
    plan = make_plan(source, Recipe.load("equal-bits", {"allow_partial": True}))
    assert plan.structure.share < 0.5
    assert f"only {plan.structure.share:.0%} of the weights in linear layers" in describe_plan(plan)
