from __future__ import annotations

from pathlib import Path

import pytest
from artifacts import write_checkpoint
from reports import sample_evaluation
from tiny_models import tiny_model, tiny_tokenizer
from tiny_vision import save_pictures, tiny_vision_model, write_processor

from shiftadd_cli.errors import ArtifactError, OutputError
from shiftadd_cli.evaluation.compare import evaluate
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
    made = write_checkpoint(tiny_model("llama"), tmp_path_factory.mktemp("saved") / "out").folder
    tiny_tokenizer().save_pretrained(made)
    return made


def measure(folder: Path, tokens: int = 60):
    return evaluate([str(folder)], against=str(folder), context=16, max_tokens=tokens, show_progress=False)


def test_what_was_measured_is_read_again_and_the_same_measurement_kept_once(folder):
    assert load_evaluations(folder) == ()
    result = measure(folder)
    assert save_evaluations(result) == [folder / EVALUATION_FILE]
    first = (folder / EVALUATION_FILE).read_bytes()
    (entry,) = load_evaluations(folder)
    assert entry.model.perplexity == result.models[0].score.perplexity
    assert entry.original.perplexity == result.original.score.perplexity
    assert entry.model.kl == result.models[0].score.kl
    save_evaluations(measure(folder))
    assert (folder / EVALUATION_FILE).read_bytes() == first
    save_evaluations(measure(folder, 40))
    assert [each.tokens for each in load_evaluations(folder)] == [60, 40]
    assert not list(folder.glob("*partial*"))


def test_originals_have_no_place_for_it(folder, tmp_path):
    with pytest.raises(OutputError, match="leave it out"):
        check_saving(["demo", str(tmp_path), "some/model"])
    check_saving(["demo", str(folder)])


@pytest.mark.parametrize("text", ["{", "[]", '{"schema_version": 2, "evaluations": []}', '{"evaluations": [{}]}'])
def test_a_damaged_file_is_refused_before_anything_is_measured(tmp_path, text):
    folder = write_checkpoint(tiny_model("llama"), tmp_path / "out").folder
    (folder / EVALUATION_FILE).write_text(text)
    with pytest.raises(ArtifactError, match=r"evaluation\.json"):
        check_saving([str(folder)])


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_checkpoint(tiny_vision_model("vit"), tmp_path_factory.mktemp("saved") / "vit").folder
    write_processor(made)
    return made


def test_measurements_on_images_are_kept_too(vision, tmp_path):
    pictures = save_pictures(tmp_path / "pictures", 12)
    result = evaluate([str(vision)], against=str(vision), dataset=str(pictures), batch_size=4, show_progress=False)
    check_saving([str(vision)])
    save_evaluations(result)
    (entry,) = load_evaluations(vision)
    assert isinstance(entry, ImageEvaluationReport)
    assert (entry.images, entry.model.top1, entry.model.agreement) == (12, None, 1.0)
    assert entry.model.kl == result.models[0].score.kl
    told = entry.quality
    assert (told.what, told.value, told.original, told.unit) == (
        "same top class",
        "100.0 ± 0.0%",
        None,
        "nats an image",
    )
    save_evaluations(result)
    assert len(load_evaluations(vision)) == 1


def scored(**values: float) -> ImageScoreReport:
    empty = dict.fromkeys(ImageScoreReport.model_fields) | {
        "spec": "m",
        "dtype": "float32",
        "calibrated_on_test": False,
    }
    return ImageScoreReport(**empty | values)


def test_windows_that_begin_otherwise_are_another_measurement():
    plain = sample_evaluation()
    begun = plain.model_copy(update={"window_start": "<bos>"})
    assert plain.key != begun.key
    assert begun.quality.on.endswith("context 64, windows begin with <bos>")
    assert plain.quality.on.endswith("context 64")
    # Files of before had no such field.
    fields = plain.model_dump(mode="json")
    del fields["window_start"]
    assert EvaluationReport.model_validate(fields) == plain


@pytest.mark.parametrize(
    ("values", "what", "value", "original"),
    [
        ({"top1": 0.676, "top1_error": 0.0148, "kl": 0.1}, "top-1", "67.6 ± 1.5%", "50.0%"),
        ({"neighbours": 0.9, "cosine": 0.99}, "nearest neighbours", "90.0%", "50.0%"),
        ({"cosine": 0.98765, "cosine_error": 0.001}, "cosine with the original", "0.9877 ± 0.0010", None),
        ({"agreement": 0.875, "kl": 0.1}, "same top class", "87.5%", None),
    ],
)
def test_the_best_known_measure_of_images_is_shown(values, what, value, original):
    entry = ImageEvaluationReport(
        data="pictures",
        data_fingerprint="d" * 64,
        images=1000,
        device="cpu",
        original=scored(top1=0.5, neighbours=0.5),
        model=scored(**values),
    )
    told = entry.quality
    assert (told.what, told.value, told.original) == (what, value, original)
    assert told.on == "pictures, 1,000 images"
    assert (told.divergence is None) == ("kl" not in values)
