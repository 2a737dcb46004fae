from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from artifacts import write_checkpoint
from reports import sample_evaluation
from tiny_models import tiny_model, tiny_tokenizer
from tiny_vision import save_pictures, tiny_vision_model, write_processor

from shiftadd_cli.errors import ArtifactError, OutputError
from shiftadd_cli.evaluation.compare import Evaluation, evaluate
from shiftadd_cli.report.evaluation_file import (
    EVALUATION_FILE,
    EvaluationReport,
    ImageEvaluationReport,
    ImageScoreReport,
    check_saving,
    load_evaluations,
    save_evaluations,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = write_checkpoint(tiny_model("llama"), tmp_path_factory.mktemp("saved") / "out")
    tiny_tokenizer().save_pretrained(checkpoint.folder)
    return checkpoint.folder


def measure(folder: Path, tokens: int = 60) -> Evaluation:
    result = evaluate([str(folder)], against=str(folder), context=16, max_tokens=tokens, show_progress=False)
    assert isinstance(result, Evaluation)
    return result


def test_measurement_is_read_back_and_saved_only_once(folder: Path) -> None:
    assert load_evaluations(folder) == ()
    result = measure(folder)
    assert save_evaluations(result) == [folder / EVALUATION_FILE]
    first = (folder / EVALUATION_FILE).read_bytes()
    (entry,) = load_evaluations(folder)
    assert isinstance(entry, EvaluationReport)
    assert entry.original is not None
    assert result.original is not None
    assert entry.model.perplexity == result.models[0].score.perplexity
    assert entry.original.perplexity == result.original.score.perplexity
    assert entry.model.kl == result.models[0].score.kl
    save_evaluations(measure(folder))
    assert (folder / EVALUATION_FILE).read_bytes() == first
    save_evaluations(measure(folder, 40))
    entry, other = load_evaluations(folder)
    assert isinstance(entry, EvaluationReport)
    assert isinstance(other, EvaluationReport)
    assert (entry.tokens, other.tokens) == (60, 40)
    assert not list(folder.glob("*partial*"))


def test_originals_cannot_store_evaluations(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="leave it out"):
        check_saving(["demo", str(tmp_path), "some/model"])
    check_saving(["demo", str(folder)])


@pytest.mark.parametrize("text", ["{", "[]", '{"schema_version": 2, "evaluations": []}', '{"evaluations": [{}]}'])
def test_damaged_file_is_refused_before_measuring(tmp_path: Path, text: str) -> None:
    folder = write_checkpoint(tiny_model("llama"), tmp_path / "out").folder
    (folder / EVALUATION_FILE).write_text(text)
    with pytest.raises(ArtifactError, match=r"evaluation\.json"):
        check_saving([str(folder)])


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = write_checkpoint(tiny_vision_model("vit"), tmp_path_factory.mktemp("saved") / "vit")
    write_processor(checkpoint.folder)
    return checkpoint.folder


def test_measurements_on_images_are_saved_too(vision: Path, tmp_path: Path) -> None:
    pictures = save_pictures(tmp_path / "pictures", 12)
    result = evaluate([str(vision)], against=str(vision), dataset=str(pictures), batch_size=4, show_progress=False)
    check_saving([str(vision)])
    save_evaluations(result)
    (entry,) = load_evaluations(vision)
    assert isinstance(entry, ImageEvaluationReport)
    assert (entry.images, entry.model.top1, entry.model.agreement) == (12, None, 1.0)
    assert entry.model.kl == result.models[0].score.kl
    quality = entry.quality
    assert (quality.what, quality.value, quality.original, quality.unit) == (
        "same top class",
        "100.0 ± 0.0%",
        None,
        "nats an image",
    )
    save_evaluations(result)
    assert len(load_evaluations(vision)) == 1


def scored(**values: float) -> ImageScoreReport:
    empty: dict[str, Any] = dict.fromkeys(ImageScoreReport.model_fields) | {
        "spec": "m",
        "dtype": "float32",
        "calibrated_on_test": False,
    }
    return ImageScoreReport(**empty | values)


def test_start_of_windows_distinguishes_measurements() -> None:
    plain = sample_evaluation()
    with_start = plain.model_copy(update={"window_start": "<bos>"})
    assert plain.key != with_start.key
    assert with_start.quality.on.endswith("context 64, windows begin with <bos>")
    assert plain.quality.on.endswith("context 64")
    # Older files lack this field.
    fields = plain.model_dump(mode="json")
    del fields["window_start"]
    assert EvaluationReport.model_validate(fields) == plain


@pytest.mark.parametrize(
    ("values", "measure", "value", "original"),
    [
        ({"top1": 0.676, "top1_error": 0.0148, "kl": 0.1}, "top-1", "67.6 ± 1.5%", "50.0%"),
        ({"neighbours": 0.9, "cosine": 0.99}, "nearest neighbours", "90.0%", "50.0%"),
        ({"cosine": 0.98765, "cosine_error": 0.001}, "cosine with the original", "0.9877 ± 0.0010", None),
        ({"agreement": 0.875, "kl": 0.1}, "same top class", "87.5%", None),
    ],
)
def test_best_known_measure_of_images_is_shown(
    values: dict[str, float], measure: str, value: str, original: str | None
) -> None:
    entry = ImageEvaluationReport(
        data="pictures",
        data_fingerprint="d" * 64,
        images=1000,
        device="cpu",
        original=scored(top1=0.5, neighbours=0.5),
        model=scored(**values),
    )
    quality = entry.quality
    assert (quality.what, quality.value, quality.original) == (measure, value, original)
    assert quality.on == "pictures, 1,000 images"
    assert (quality.divergence is None) == ("kl" not in values)
