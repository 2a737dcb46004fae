from __future__ import annotations

from pathlib import Path

import pytest
from artifacts import write_checkpoint
from tiny_models import tiny_model, tiny_tokenizer

from shiftadd_cli.errors import ArtifactError, OutputError
from shiftadd_cli.evaluation.compare import evaluate
from shiftadd_cli.report.evaluation_file import EVALUATION_FILE, check_saving, load_evaluations, save_evaluations


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
