"""Vision models measured on pictures, against numbers computed another way."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import save_tiny
from tiny_vision import CLASSES, save_pictures, save_tiny_vision, write_processor

from shiftadd_cli.data.images import image_reader, load_images, read_images
from shiftadd_cli.errors import CalibrationError, RecipeError, SourceError
from shiftadd_cli.evaluation.compare import evaluate
from shiftadd_cli.source import open_source


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return save_pictures(tmp_path_factory.mktemp("data") / "pictures", 14, layout="folders")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
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


def predictions(model, pictures):
    source = open_source(model)
    data = load_images(str(pictures), split="test")
    pixels = torch.stack([each for _, each in read_images(data, image_reader(source), range(len(data)))])
    with torch.no_grad():
        return source.load_model()(pixel_values=pixels), torch.tensor([CLASSES.index(label) for label in data.labels])


def run(*names, **options):
    return evaluate(names, show_progress=False, **{"batch_size": 4, **options})


def test_accuracy_divergence_and_agreement(models, pictures):
    found = run(models["two"], against=models["one"], dataset=str(pictures))
    (first, classes), (second, _) = (predictions(models[name], pictures) for name in ("one", "two"))
    one, two = (each.logits.double().log_softmax(-1) for each in (first, second))
    score = found.models[0].score
    right = two.argmax(-1) == classes
    assert score.top1 == pytest.approx(right.double().mean().item())
    assert score.top1_error == pytest.approx(right.double().std().item() / math.sqrt(14))
    assert score.top5 == pytest.approx((two.argsort(-1)[:, 1:] == classes[:, None]).any(-1).double().mean().item())
    kl = (one.exp() * (one - two)).sum(-1)
    assert score.kl == pytest.approx(kl.mean().item(), rel=1e-4)
    assert score.kl_error == pytest.approx(kl.std().item() / math.sqrt(14), rel=1e-4)
    assert score.agreement == (one.argmax(-1) == two.argmax(-1)).double().mean().item()
    assert score.cosine is None
    assert found.original.score.kl is None
    assert (found.images, found.available, found.labelled, found.image_shape) == (14, 14, True, (3, 16, 16))


def test_features_without_a_head(models, pictures):
    found = run(models["other"], against=models["bare"], dataset=str(pictures))
    one, two = (predictions(models[name], pictures)[0].pooler_output for name in ("bare", "other"))
    score = found.models[0].score
    assert score.cosine == pytest.approx(torch.cosine_similarity(one, two, dim=-1).mean().item(), abs=1e-5)
    assert score.top1 is None
    assert score.kl is None
    assert 0 <= score.neighbours <= 1
    assert found.original.score.neighbours is not None


def test_a_model_against_itself_and_some_of_the_pictures(models, pictures):
    found = run(models["one"], against=models["one"], dataset=str(pictures), max_images=5)
    assert found.images == 5
    assert found.models[0].score.agreement == 1
    assert found.models[0].score.kl == 0


def test_pictures_without_labels_still_compare(models, tmp_path):
    folder = save_pictures(tmp_path / "set", 5)
    (folder / "004.png").write_bytes(b"no picture")
    found = run(models["two"], against=models["one"], dataset=str(folder))
    assert (found.images, found.unreadable, found.labelled) == (4, 1, False)
    assert found.models[0].score.top1 is None
    assert found.models[0].score.kl > 0


def test_what_cannot_be_compared_is_one_sentence(models, pictures, tmp_path):
    text = str(save_tiny("llama", tmp_path / "text"))
    for names, options, error, match in (
        ((models["one"],), {"against": text}, RecipeError, "reads images and .* reads text"),
        ((text,), {}, CalibrationError, "is a folder"),
        ((models["bare"],), {"against": models["one"]}, RecipeError, "gives 32 features and .* 6 class scores"),
    ):
        with pytest.raises(error, match=match) as caught:
            run(*names, **{"dataset": str(pictures), **options})
        assert "\n" not in str(caught.value)
    with pytest.raises(CalibrationError, match="8 of the 10 classes of builtin"):
        run(_of_few_classes(tmp_path), dataset="builtin")
    other = save_tiny_vision("vit", tmp_path / "scaled", seed=1)
    write_processor(other, size=16)
    settings = (other / "preprocessor_config.json").read_text().replace("0.25", "0.5")
    (other / "preprocessor_config.json").write_text(settings)
    with pytest.raises(RecipeError, match="read images in different ways"):
        run(str(other), against=models["one"], dataset=str(pictures))


def _of_few_classes(tmp_path):
    names = dict(enumerate(("a", "b")))
    changes = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    return str(save_tiny_vision("vit", tmp_path / "few", **changes))


def test_a_vision_model_has_no_tokenizer(models):
    from shiftadd_cli.runtime.opened import open_any

    with pytest.raises(SourceError, match="is a vision model, which reads no text"):
        open_any(models["one"]).load_tokenizer()
