"""Vision models measured on pictures, compared with numbers computed another way."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny
from tiny_vision import CLASSES, save_pictures, save_tiny_vision, write_processor

from shiftadd_cli.data.images import image_reader, load_images, read_images
from shiftadd_cli.errors import CalibrationError, RecipeError, ShiftaddError, SourceError
from shiftadd_cli.evaluation.compare import evaluate
from shiftadd_cli.evaluation.compare_images import ImageEvaluation
from shiftadd_cli.source import open_source


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pictures(tmp_path_factory.mktemp("data") / "pictures", 14, layout="folders")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {
        name: str(save_tiny_vision(family, root / name, seed=seed))
        for name, family, seed in (
            ("one", "vit", 0),
            ("two", "vit", 1),
            ("bare", "dinov2-bare", 0),
            ("other", "dinov2-bare", 1),
        )
    }


def predictions(model: str, pictures: Path) -> tuple[Any, torch.Tensor]:
    source = open_source(model)
    data = load_images(str(pictures), split="test")
    assert data.labels is not None
    inputs = torch.stack([pixels for _, pixels in read_images(data, image_reader(source), range(len(data)))])
    with torch.no_grad():
        return source.load_model()(pixel_values=inputs), torch.tensor([CLASSES.index(label) for label in data.labels])


def run(*names: str, **options: Any) -> ImageEvaluation:
    result = evaluate(names, show_progress=False, batch_size=4, **options)
    assert isinstance(result, ImageEvaluation)
    return result


def test_accuracy_divergence_and_agreement_match_their_definitions(models: dict[str, str], pictures: Path) -> None:
    result = run(models["two"], against=models["one"], dataset=str(pictures))
    (first, classes), (second, _) = (predictions(models[name], pictures) for name in ("one", "two"))
    one, two = (outputs.logits.double().log_softmax(-1) for outputs in (first, second))
    score = result.models[0].score
    right = two.argmax(-1) == classes
    assert score.top1 == pytest.approx(right.double().mean().item())
    assert score.top1_error == pytest.approx(right.double().std().item() / math.sqrt(14))
    assert score.top5 == pytest.approx((two.argsort(-1)[:, 1:] == classes[:, None]).any(-1).double().mean().item())
    kl = (one.exp() * (one - two)).sum(-1)
    assert score.kl == pytest.approx(kl.mean().item(), rel=1e-4)
    assert score.kl_error == pytest.approx(kl.std().item() / math.sqrt(14), rel=1e-4)
    assert score.agreement == (one.argmax(-1) == two.argmax(-1)).double().mean().item()
    assert score.cosine is None
    assert result.original is not None
    assert result.original.score.kl is None
    assert (result.images, result.available, result.labelled, result.image_shape) == (14, 14, True, (3, 16, 16))


def test_models_without_a_head_are_compared_by_features(models: dict[str, str], pictures: Path) -> None:
    result = run(models["other"], against=models["bare"], dataset=str(pictures))
    one, two = (predictions(models[name], pictures)[0].pooler_output for name in ("bare", "other"))
    score = result.models[0].score
    assert score.cosine == pytest.approx(torch.cosine_similarity(one, two, dim=-1).mean().item(), abs=1e-5)
    assert score.top1 is None
    assert score.kl is None
    assert score.neighbours is not None
    assert 0 <= score.neighbours <= 1
    assert result.original is not None
    assert result.original.score.neighbours is not None


def test_a_model_agrees_with_itself_on_some_of_the_pictures(models: dict[str, str], pictures: Path) -> None:
    result = run(models["one"], against=models["one"], dataset=str(pictures), max_images=5)
    assert result.images == 5
    assert result.models[0].score.agreement == 1
    assert result.models[0].score.kl == 0


def test_models_are_compared_on_pictures_without_labels(models: dict[str, str], tmp_path: Path) -> None:
    folder = save_pictures(tmp_path / "set", 5)
    (folder / "004.png").write_bytes(b"no picture")
    result = run(models["two"], against=models["one"], dataset=str(folder))
    assert (result.images, result.unreadable, result.labelled) == (4, 1, False)
    score = result.models[0].score
    assert score.top1 is None
    assert score.kl is not None
    assert score.kl > 0


def test_models_and_pictures_that_do_not_fit_are_refused(
    models: dict[str, str], pictures: Path, tmp_path: Path
) -> None:
    text = str(save_tiny("llama", tmp_path / "text"))
    cases: list[tuple[str, dict[str, str], type[ShiftaddError], str]] = [
        (models["one"], {"against": text}, RecipeError, "reads images and .* reads text"),
        (text, {}, CalibrationError, "is a folder"),
        (models["bare"], {"against": models["one"]}, RecipeError, "gives 32 features and .* 6 class scores"),
    ]
    for model, options, error, match in cases:
        with pytest.raises(error, match=match) as caught:
            run(model, dataset=str(pictures), **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(CalibrationError, match="8 of the 10 classes of builtin"):
        run(_model_of_two_classes(tmp_path), dataset="builtin")
    other = save_tiny_vision("vit", tmp_path / "scaled", seed=1)
    write_processor(other, size=16)
    settings = (other / "preprocessor_config.json").read_text().replace("0.25", "0.5")
    (other / "preprocessor_config.json").write_text(settings)
    with pytest.raises(RecipeError, match="read images in different ways"):
        run(str(other), against=models["one"], dataset=str(pictures))


def _model_of_two_classes(tmp_path: Path) -> str:
    names = dict(enumerate(("a", "b")))
    changes: dict[str, Any] = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    return str(save_tiny_vision("vit", tmp_path / "few", **changes))


def test_loading_the_tokenizer_of_a_vision_model_is_refused(models: dict[str, str]) -> None:
    from shiftadd_cli.runtime.opened import open_any

    with pytest.raises(SourceError, match="is a vision model, which reads no text"):
        open_any(models["one"]).load_tokenizer()
