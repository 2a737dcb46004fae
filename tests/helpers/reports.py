"""Reports of invented runs, for tests of their consumers."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from artifacts import COMMON
from formats import recipe_of
from tiny_models import tiny_model

from shiftadd_cli.artifact.format import ArtifactFormat
from shiftadd_cli.bcq.weight import PackedLayout
from shiftadd_cli.report.cost import Cost, model_cost
from shiftadd_cli.report.evaluation_file import EvaluationReport, ScoreReport
from shiftadd_cli.report.page import Run
from shiftadd_cli.report.schema import (
    BitPlanReport,
    BlockReport,
    CalibrationReport,
    DistillationReport,
    KeptReport,
    LayerReport,
    MachineReport,
    Report,
    SizeReport,
    SourceReport,
    TableReport,
    TimeReport,
    TradeOffPoint,
    UniformPoint,
    average_kinds,
)
from shiftadd_cli.report.unit_costs import load_unit_costs
from shiftadd_cli.source import find_structure


def sample_report(word: str = "sample", *, calibrated: bool = True, mixed: bool = True, **changes: Any) -> Report:
    """A report of four layers; `word` is in every text from outside."""
    layers = [
        LayerReport(
            name=f"{word}.{block}.{kind}",
            kind=f"{word}.{kind}",
            block=block,
            out_features=32,
            in_features=64,
            bits=2 + block if mixed else 3,
            bits_per_weight=3.25,
            weight_error=0.01 * (1 + block),
            output_error=0.002 * 10**block if calibrated else None,
            calibrated=calibrated,
        )
        for block in range(2)
        for kind in ("q", "v")
    ]
    values: dict[str, Any] = {
        "command": ["quantize", word, "-o", "out dir"],
        "source": SourceReport(
            spec=word,
            name=word,
            architecture=f"{word}ForCausalLM",
            fingerprint="f" * 64,
            dtype="bfloat16",
            parameters=10_000,
            file_bytes=20_000,
            model_bytes=20_000,
        ),
        "recipe": recipe_of(bits=2).model_dump(mode="json") | {"calibration": word},
        "recipe_fingerprint": "a" * 64,
        "calibration": CalibrationReport(name=word, fingerprint="b" * 64, samples=8, seq_len=32, tokens=256)
        if calibrated
        else None,
        "size": SizeReport(
            files_bytes=5_000,
            quantized_bytes=3_000,
            kept_bytes=1_500,
            quantized_weights=8_192,
            bits_per_weight=3.25,
            planes_per_weight=2.5,
            whole_file_bits_per_weight=4.0,
        ),
        "kinds": average_kinds(layers),
        "layers": layers,
        "blocks": [BlockReport(name=word, error_before=0.2, error_after=0.1, kept=True)],
        "distillation": DistillationReport(divergence_before=0.4, divergence_after=0.3, kept=True),
        "tables": [TableReport(modules=[word], rows=10, columns=4, bits_per_weight=12.0, weight_error=1e-4)],
        "kept": [KeptReport(name=word, reason=word)],
        "seconds": TimeReport(total=12, trace=1, forward=2, solve=3, read_and_write=4),
        "machine": MachineReport(
            device="cpu",
            threads=2,
            peak_memory_bytes=700_000_000,
            expected_memory_bytes=800_000_000,
            versions={"shiftadd-cli": "0.1.0", "python": "3.11", "torch": word},
        ),
    }
    if mixed:
        values["bit_plan"] = BitPlanReport(
            fingerprint="c" * 64,
            sensitivity=word,
            predicted_loss=0.5,
            uniform=[UniformPoint(bits=bits, bits_per_weight=bits + 0.2, predicted_loss=4.0**-bits) for bits in (2, 3)],
            bound=[TradeOffPoint(bits_per_weight=bits + 0.2, predicted_loss=4.0**-bits / 2) for bits in (2, 3)],
        )
    return Report(**(values | changes))


@lru_cache(maxsize=1)
def sample_cost() -> Cost:
    """Costs of a tiny Llama."""
    model = tiny_model("llama")
    layouts = {
        spec.name: PackedLayout(COMMON, spec.out_features, spec.in_features) for spec in find_structure(model).linears
    }
    tensors = {
        f"{name}.{suffix}": shape for name, layout in layouts.items() for suffix, shape in layout.tensors().items()
    }
    tensors |= {
        name: (tuple(tensor.shape), tensor.dtype)
        for name, tensor in model.state_dict().items()
        if name.removesuffix(".weight") not in layouts
    }
    return model_cost(model, ArtifactFormat(COMMON, layouts), tensors, load_unit_costs())


def sample_evaluation(word: str = "sample", *, original: bool = True) -> EvaluationReport:
    """A model measured against its original, or alone."""
    score = ScoreReport(
        spec=word,
        dtype="bfloat16",
        perplexity=20.0,
        perplexity_error=0.5,
        kl=0.25 if original else None,
        kl_error=0.01 if original else None,
        agreement=0.75 if original else None,
        calibrated_on_test=True,
    )
    return EvaluationReport(
        text=word,
        text_fingerprint="d" * 64,
        tokens=1000,
        scored_tokens=990,
        context=64,
        device="cpu",
        original=score.model_copy(update={"perplexity": 15.0, "kl": None}) if original else None,
        model=score,
    )


def sample_run(word: str = "sample", **changes: Any) -> Run:
    """A run of `sample_report`, measured with and without an original."""
    evaluations = (sample_evaluation(word, original=False), sample_evaluation(word))
    return Run(word, sample_report(word, **changes), sample_cost(), evaluations)
