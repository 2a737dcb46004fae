"""Pictures from folders, tables and scikit-learn, and the errors for unusable ones."""

from __future__ import annotations

import re
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tiny_vision import CLASSES, save_pictures, write_processor
from transformers import CLIPConfig, Dinov2Config, PreTrainedConfig, ViTConfig

from shiftadd_cli.data import images_table
from shiftadd_cli.data.images import (
    MAX_UNREADABLE,
    ImageReader,
    draw_images,
    images_remark,
    load_images,
    read_images,
    reads_digits,
)
from shiftadd_cli.data.text import Split
from shiftadd_cli.errors import CalibrationError
from shiftadd_cli.source.image_processor import load_image_processor


@pytest.fixture
def reader(tmp_path_factory: pytest.TempPathFactory) -> ImageReader:
    folder = tmp_path_factory.mktemp("processor")
    write_processor(folder)
    return ImageReader(load_image_processor(folder), 3, "the model")


def assert_refused(spec: str | Path, match: str) -> None:
    with pytest.raises(CalibrationError, match=match) as caught:
        load_images(str(spec), split="test")
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", ["flat", "folders", "table"])
def test_labels_come_from_subfolders_or_a_table(tmp_path: Path, layout: str) -> None:
    data = load_images(str(save_pictures(tmp_path / "set", 8, layout=layout)), split="calibration")
    assert len(data) == 8
    if layout == "flat":
        assert data.labels is None
        return
    assert data.labels is not None
    for path, label in zip(data.places, data.labels, strict=True):
        number = int(path[-7:-4])
        assert label == CLASSES[number % len(CLASSES)]


def test_a_table_may_number_classes_and_lie_inside(tmp_path: Path) -> None:
    folder = save_pictures(tmp_path / "set", 2)
    (folder / "labels.csv").write_text("file_name,label\n000.png,4\n001.png,0\n")
    assert load_images(str(folder), split="test").labels == (4, 0)
    (folder / "labels.csv").write_text("file_name,label\n000.png,4\n")
    assert_refused(folder, r"labels\.csv has no label for 001\.png")
    (folder / "labels.csv").write_text("picture,kind\n")
    assert_refused(folder, r"needs the columns file and name or label")


def test_built_in_digits_are_split_and_labelled() -> None:
    parts = {split: load_images("builtin", split=split) for split in ("calibration", "test")}
    assert [len(data) for data in parts.values()] == [1297, 500]
    assert parts["test"].labels is not None
    assert set(parts["test"].labels) == set(range(10))
    assert parts["test"].fingerprint != parts["calibration"].fingerprint
    picture = Image.open(BytesIO(parts["test"].read(0)))
    assert picture.size == (8, 8)
    assert picture.mode == "L"


def named(names: Iterable[str], **settings: Any) -> ViTConfig:
    return ViTConfig(id2label=dict(enumerate(names)), **settings)


def unnamed(count: int) -> dict[str, Any]:
    """The setting for a number of classes without names; the configurations' signatures leave it out."""
    return {"num_labels": count}


MODELS_OF_DIGITS: dict[str, PreTrainedConfig] = {
    "named": named("0123456789"),
    "unnamed and grey": ViTConfig(num_channels=1, **unnamed(10)),
}
MODELS_OF_PHOTOGRAPHS: dict[str, PreTrainedConfig] = {
    "named": named(CLASSES),
    "ten, named": named("abcdefghij", num_channels=1),
    "ten in colour, unnamed": ViTConfig(**unnamed(10)),
    "more in grey, unnamed": ViTConfig(num_channels=1, **unnamed(12)),
    "encoder": Dinov2Config(),
    "two towers": CLIPConfig(**unnamed(10)),
}


def remark_on(spec: str, config: PreTrainedConfig) -> str:
    remark = images_remark(spec, config)
    assert remark is not None
    return remark


@pytest.mark.parametrize("model", MODELS_OF_DIGITS)
def test_models_of_digits_are_recognised_and_get_digits(model: str) -> None:
    config = MODELS_OF_DIGITS[model]
    assert reads_digits(config)
    assert len(load_images("self", split="calibration", config=config)) == 1297
    assert images_remark("builtin", config) is None
    assert "handwritten digits" in remark_on("self", config)
    assert "`calibration=builtin`" in remark_on("noise", config)


@pytest.mark.parametrize("model", MODELS_OF_PHOTOGRAPHS)
def test_other_models_get_noise_and_a_remark_on_photographs(model: str) -> None:
    config = MODELS_OF_PHOTOGRAPHS[model]
    assert not reads_digits(config)
    noise = load_images("noise", split="calibration")
    assert load_images("self", split="calibration", config=config).fingerprint == noise.fingerprint
    assert images_remark("self", config) == images_remark("noise", config)
    assert "`calibration=FOLDER`" in remark_on("noise", config)
    assert re.search("digits.*`calibration=FOLDER` or `calibration=noise`", remark_on("builtin", config))


def test_the_users_own_pictures_get_no_remark(tmp_path: Path) -> None:
    for spec in (str(tmp_path), "pictures.parquet", "somebody/pictures:train"):
        for config in (*MODELS_OF_DIGITS.values(), *MODELS_OF_PHOTOGRAPHS.values()):
            assert images_remark(spec, config) is None


def test_self_means_noise_without_a_model() -> None:
    data = load_images("self", split="test")
    assert data.fingerprint == load_images("noise", split="test").fingerprint


@pytest.mark.parametrize("typed", [True, False])
def test_parquet_files_are_read_with_and_without_types_of_datasets(
    tmp_path: Path, typed: bool, reader: ImageReader
) -> None:
    import datasets
    import pyarrow
    from pyarrow import parquet

    files = sorted(save_pictures(tmp_path / "set", 4).iterdir())
    cells = [{"bytes": file.read_bytes(), "path": None} for file in files]
    table = tmp_path / "set.parquet"
    if typed:
        features = datasets.Features({"photo": datasets.Image(), "kind": datasets.ClassLabel(names=list(CLASSES))})
        rows = datasets.Dataset.from_dict({"photo": cells, "kind": [2, 0, 1, 5]}, features=features)
        rows.to_parquet(table)
    else:
        parquet.write_table(pyarrow.table({"image": cells, "label": [2, 0, 1, 5]}), table)
    table_data = load_images(str(table), split="test")
    assert table_data.labels == (("ship", "cat", "dog", "bird") if typed else (2, 0, 1, 5))
    folder_data = load_images(str(tmp_path / "set"), split="test")
    for (_, from_table), (_, from_folder) in zip(
        read_images(table_data, reader, range(4)), read_images(folder_data, reader, range(4)), strict=True
    ):
        assert torch.equal(from_table, from_folder)


def test_the_seed_determines_the_order_of_drawn_pictures(tmp_path: Path, reader: ImageReader) -> None:
    data = load_images(str(save_pictures(tmp_path / "set", 9)), split="test")
    nine = draw_images(data, reader, samples=9, seed=1)
    assert sorted(nine.indices) == list(range(9))
    four = draw_images(data, reader, samples=4, seed=1)
    assert torch.equal(four.inputs, nine.inputs[:4])
    assert draw_images(data, reader, samples=9, seed=2).indices != nine.indices
    with pytest.raises(CalibrationError, match=r"10 images are requested, but set .* has 9; .*`samples` 9"):
        draw_images(data, reader, samples=10, seed=1)


def test_inputs_come_from_the_image_processor(tmp_path: Path, reader: ImageReader) -> None:
    folder = save_pictures(tmp_path / "set", 1)
    data = load_images(str(folder), split="test")
    (_, inputs), *_ = read_images(data, reader, [0])
    picture = Image.open(folder / "000.png").resize((16, 16), Image.Resampling.BILINEAR)
    pixels = torch.tensor(list(picture.convert("RGB").tobytes()), dtype=torch.float32).view(16, 16, 3).permute(2, 0, 1)
    torch.testing.assert_close(inputs, (pixels / 255 - 0.5) / 0.25, rtol=0, atol=0.02)


def test_unreadable_pictures_are_skipped_with_a_warning_up_to_a_limit(
    tmp_path: Path, reader: ImageReader, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_pictures(tmp_path / "set", MAX_UNREADABLE + 3)
    files = sorted(folder.iterdir())
    content = files[0].read_bytes()
    files[0].write_bytes(b"no picture")
    files[1].write_bytes(content[: len(content) // 2])
    data = load_images(str(folder), split="test")
    readable = [index for index, _ in read_images(data, reader, range(len(data)))]
    assert readable == list(range(2, len(files)))
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2
    assert str(files[0]) in warnings[0]
    assert str(files[1]) in warnings[1]
    for file in files[: MAX_UNREADABLE + 1]:
        file.write_bytes(b"no picture")
    with pytest.raises(CalibrationError, match=f"{MAX_UNREADABLE + 1} images of set .* cannot be read"):
        list(read_images(data, reader, range(len(data))))
    for file in files[3:]:
        file.unlink()
    with pytest.raises(CalibrationError, match=r"No image of set .* can be read \(the first: .*000\.png\)"):
        list(read_images(load_images(str(folder), split="test"), reader, range(3)))


def test_grey_becomes_colour_and_colour_becomes_grey(tmp_path: Path, reader: ImageReader) -> None:
    grey = load_images(str(save_pictures(tmp_path / "grey", 1, mode="L")), split="test")
    (_, pixels), *_ = read_images(grey, reader, [0])
    assert torch.equal(pixels[0], pixels[1])
    write_processor(tmp_path, channels=1)
    grey_reader = ImageReader(load_image_processor(tmp_path), 1, "the model")
    colours = load_images(str(save_pictures(tmp_path / "colours", 1)), split="test")
    (_, pixels), *_ = read_images(colours, grey_reader, [0])
    assert pixels.shape == (1, 16, 16)


def test_a_wrong_number_of_channels_is_refused(tmp_path: Path, reader: ImageReader) -> None:
    data = load_images(str(save_pictures(tmp_path / "set", 1)), split="test")
    four = ImageReader(load_image_processor(_processor(tmp_path, 4)), 4, "the model")
    with pytest.raises(CalibrationError, match=r"000\.png has 3 channels, and the model takes 4"):
        list(read_images(data, four, [0]))
    three = ImageReader(load_image_processor(_processor(tmp_path, 3)), 1, "the model")
    with pytest.raises(CalibrationError, match=r"image processor of the model .*config\.json"):
        list(read_images(data, three, [0]))


def _processor(folder: Path, channels: int) -> Path:
    subfolder = folder / f"processor{channels}"
    subfolder.mkdir()
    write_processor(subfolder, channels=channels)
    return subfolder


def test_inputs_of_different_sizes_are_refused(tmp_path: Path) -> None:
    class KeepsSizes:
        def __call__(self, images: Image.Image, return_tensors: str) -> dict[str, torch.Tensor]:
            return {"pixel_values": torch.zeros(1, 3, *images.size)}

    folder = save_pictures(tmp_path / "set", 2)
    Image.new("RGB", (5, 5)).save(folder / "001.png")
    data = load_images(str(folder), split="test")
    with pytest.raises(CalibrationError, match=r"001\.png comes out .* as 3 x 5 x 5 and others as 3 x 20 x 18"):
        list(read_images(data, ImageReader(KeepsSizes(), 3, "the model"), [0, 1]))


def test_specs_without_pictures_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.md").write_text("no pictures")
    assert_refused(tmp_path / "empty", r"empty \(0 images\) holds no images")
    assert_refused(tmp_path / "text.txt", r"is a text, and a vision model reads images")
    assert_refused("wikitext2", r"is a text, and a vision model reads images")
    (tmp_path / "notes.md").write_text("no pictures")
    assert_refused(tmp_path / "notes.md", r"is not a folder of images")
    assert_refused(tmp_path / "absent", r"There are no images at .*absent")
    assert_refused(tmp_path / "absent.parquet", r"There is no file .*absent\.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    assert_refused(tmp_path / "bad.parquet", r"is not a valid parquet file")
    mixed = save_pictures(tmp_path / "mixed", 2, layout="folders")
    Image.new("RGB", (5, 5)).save(mixed / "here.png")
    assert_refused(mixed, r"has images both directly and in sub-folders \(such as here\.png\)")
    monkeypatch.setattr(images_table, "reachable", lambda _: False)
    assert_refused(
        "nobody/pictures:test", r"no such folder or file, and the data set nobody/pictures of the hub could not"
    )


def test_hub_data_sets_are_loaded_by_name_and_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: ImageReader
) -> None:
    import datasets

    files = sorted(save_pictures(tmp_path / "set", 3).iterdir())
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    sizes = {"train": 3, "validation": 2}
    monkeypatch.setattr(images_table, "reachable", lambda _: True)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda _: list(sizes))

    def load(name: str, split: str) -> datasets.Dataset:
        assert name == "somebody/pictures"
        cells = [str(file) for file in files[: sizes[split]]]
        return datasets.Dataset.from_dict({"img": cells, "label": range(sizes[split])}, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load)
    cases: tuple[tuple[str, Split, str], ...] = (
        ("somebody/pictures", "calibration", "train"),
        ("somebody/pictures", "test", "validation"),
        ("somebody/pictures:train", "test", "train"),
    )
    for spec, split, name in cases:
        data = load_images(spec, split=split)
        assert data.name == f"somebody/pictures {name}"
        assert data.labels == CLASSES[: sizes[name]]
        assert len(list(read_images(data, reader, range(len(data))))) == sizes[name]
    assert_refused("somebody/pictures:absent", r"data set somebody/pictures of the hub could not be downloaded")


def test_tables_without_pictures_are_refused(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["a"], "label": [1]}), tmp_path / "text.parquet")
    assert_refused(tmp_path / "text.parquet", r"has no column of images \(found text, label\)")
    parquet.write_table(pyarrow.table({"image": [1.5], "label": [1]}), tmp_path / "numbers.parquet")
    assert_refused(tmp_path / "numbers.parquet", r"The column 'image' of numbers\.parquet does not contain images")


def pixels_of(folder: Path, reader: ImageReader) -> torch.Tensor:
    data = load_images(str(folder), split="test")
    return torch.stack([pixels for _, pixels in read_images(data, reader, range(len(data)))])


def noise(seed: int = 0, size: tuple[int, ...] = (24, 24), high: int = 256) -> NDArray[numpy.int64]:
    return numpy.random.default_rng(seed).integers(0, high, size)


TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", TURNED)
def test_orientation_tags_turn_pictures_upright(tmp_path: Path, reader: ImageReader, orientation: int) -> None:
    for name in ("plain", "tagged"):
        (tmp_path / name).mkdir()
    upright = Image.fromarray(noise(size=(24, 24, 3)).astype("uint8"))
    upright.save(tmp_path / "plain" / "a.png")
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright.transpose(TURNED[orientation])
    stored.save(tmp_path / "tagged" / "a.png", exif=exif)
    assert torch.equal(pixels_of(tmp_path / "tagged", reader), pixels_of(tmp_path / "plain", reader))


def write_wide(folder: Path, kind: str, grey: NDArray[numpy.int64]) -> None:
    """Write grey values from 0 to 255 to a file with more than 8 bits per value."""
    folder.mkdir()
    wide = (grey * 257).astype(numpy.uint16)
    if kind == "pgm":
        height, width = grey.shape
        (folder / "a.pgm").write_bytes(b"P5 %d %d 65535\n" % (width, height) + wide.astype(">u2").tobytes())
    elif kind == "inverted.tiff":
        Image.fromarray(65535 - wide).save(folder / "a.tiff", tiffinfo={262: 0})
    else:
        Image.fromarray(wide).save(folder / f"a.{kind}")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["png", "tiff", "pgm", "inverted.tiff"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path, kind: str, channels: int) -> None:
    (tmp_path / "processor").mkdir()
    write_processor(tmp_path / "processor", channels=channels)
    reader = ImageReader(load_image_processor(tmp_path / "processor"), channels, "the model")
    grey = noise()
    write_wide(tmp_path / "wide", kind, grey)
    (tmp_path / "narrow").mkdir()
    Image.fromarray(grey.astype("uint8")).save(tmp_path / "narrow" / "a.png")
    assert torch.equal(pixels_of(tmp_path / "wide", reader), pixels_of(tmp_path / "narrow", reader))


@pytest.mark.parametrize(("dtype", "kind"), [("float32", "floating-point"), ("int32", "32-bit or signed")])
def test_values_of_unknown_range_are_refused_by_name(
    tmp_path: Path, reader: ImageReader, dtype: str, kind: str
) -> None:
    Image.fromarray(noise(high=9).astype(dtype)).save(tmp_path / "a.tiff")
    with pytest.raises(CalibrationError, match=rf"a\.tiff holds {kind} numbers.*save it with 8 or 16 bits"):
        pixels_of(tmp_path, reader)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_dropped(tmp_path: Path, reader: ImageReader, mode: str) -> None:
    for name in ("opaque", "clear"):
        (tmp_path / name).mkdir()
    opaque = Image.fromarray(noise(size=(24, 24, 3)).astype("uint8"))
    opaque = opaque.convert({"RGBA": "RGB", "LA": "L", "P": "P"}[mode])
    opaque.save(tmp_path / "opaque" / "a.png")
    if mode == "P":
        opaque.save(tmp_path / "clear" / "a.png", transparency=3)
    else:
        opaque.putalpha(Image.fromarray(noise(seed=1).astype("uint8")))
        opaque.save(tmp_path / "clear" / "a.png")
    assert torch.equal(pixels_of(tmp_path / "clear", reader), pixels_of(tmp_path / "opaque", reader))


def test_large_pictures_give_no_warning_and_larger_ones_are_skipped(
    tmp_path: Path,
    reader: ImageReader,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    for name, side in (("fits", 19), ("large", 28), ("bomb", 29)):
        Image.new("1", (side, side)).save(tmp_path / f"{name}.png")
    assert len(pixels_of(tmp_path, reader)) == 2
    assert re.search(r"bomb\.png cannot be read \(it has more than the 800 pixels", capsys.readouterr().err)
    assert not [warning for warning in recwarn if issubclass(warning.category, Image.DecompressionBombWarning)]
