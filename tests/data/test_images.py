"""Pictures from folders, tables and scikit-learn, and what is wrong with them."""

from __future__ import annotations

import re
from io import BytesIO

import numpy
import pytest
import torch
from PIL import Image
from tiny_vision import CLASSES, save_pictures, write_processor
from transformers import CLIPConfig, Dinov2Config, ViTConfig

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
from shiftadd_cli.errors import CalibrationError
from shiftadd_cli.source.image_processor import load_image_processor


@pytest.fixture
def reader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    write_processor(folder)
    return ImageReader(load_image_processor(folder), 3, "the model")


def refused(spec, match, **options):
    with pytest.raises(CalibrationError, match=match) as caught:
        load_images(str(spec), split="test", **options)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", ["flat", "folders", "table"])
def test_labels_come_from_sub_folders_or_a_table(tmp_path, layout):
    data = load_images(str(save_pictures(tmp_path / "set", 8, layout=layout)), split="calibration")
    assert len(data) == 8
    if layout == "flat":
        assert data.labels is None
        return
    for place, label in zip(data.places, data.labels, strict=True):
        number = int(place[-7:-4])
        assert label == CLASSES[number % len(CLASSES)]


def test_a_table_may_number_classes_and_lie_inside(tmp_path):
    folder = save_pictures(tmp_path / "set", 2)
    (folder / "labels.csv").write_text("file_name,label\n000.png,4\n001.png,0\n")
    assert load_images(str(folder), split="test").labels == (4, 0)
    (folder / "labels.csv").write_text("file_name,label\n000.png,4\n")
    refused(folder, r"labels\.csv has no label for 001\.png")
    (folder / "labels.csv").write_text("picture,kind\n")
    refused(folder, r"needs the columns file and name or label")


def test_built_in_digits_are_split_and_labelled():
    parts = {split: load_images("builtin", split=split) for split in ("calibration", "test")}
    assert [len(data) for data in parts.values()] == [1297, 500]
    assert set(parts["test"].labels) == set(range(10))
    assert parts["test"].fingerprint != parts["calibration"].fingerprint
    picture = Image.open(BytesIO(parts["test"].read(0)))
    assert picture.size == (8, 8)
    assert picture.mode == "L"


def classes(names, **settings):
    return ViTConfig(id2label=dict(enumerate(names)), **settings)


MODELS_OF_DIGITS = {
    "named": classes("0123456789"),
    "unnamed and grey": ViTConfig(num_labels=10, num_channels=1),
}
MODELS_OF_PHOTOGRAPHS = {
    "named": classes(CLASSES),
    "ten, named": classes("abcdefghij", num_channels=1),
    "ten in colour, unnamed": ViTConfig(num_labels=10),
    "more in grey, unnamed": ViTConfig(num_labels=12, num_channels=1),
    "encoder": Dinov2Config(),
    "two towers": CLIPConfig(num_labels=10),
}


@pytest.mark.parametrize("model", MODELS_OF_DIGITS)
def test_a_model_of_digits_is_known_by_its_classes_and_served_by_the_digits(model):
    config = MODELS_OF_DIGITS[model]
    assert reads_digits(config)
    assert len(load_images("self", split="calibration", config=config)) == 1297
    assert images_remark("builtin", config) is None
    assert "handwritten digits" in images_remark("self", config)
    assert "`calibration=builtin`" in images_remark("noise", config)


@pytest.mark.parametrize("model", MODELS_OF_PHOTOGRAPHS)
def test_any_other_model_is_served_by_noise_and_told_that_photographs_are_better(model):
    config = MODELS_OF_PHOTOGRAPHS[model]
    assert not reads_digits(config)
    noise = load_images("noise", split="calibration")
    assert load_images("self", split="calibration", config=config).fingerprint == noise.fingerprint
    assert images_remark("self", config) == images_remark("noise", config)
    assert "`calibration=FOLDER`" in images_remark("noise", config)
    assert re.search("digits.*`calibration=FOLDER` or `calibration=noise`", images_remark("builtin", config))


def test_nothing_is_remarked_of_pictures_of_the_users_own(tmp_path):
    for spec in (str(tmp_path), "pictures.parquet", "somebody/pictures:train"):
        for config in (*MODELS_OF_DIGITS.values(), *MODELS_OF_PHOTOGRAPHS.values()):
            assert images_remark(spec, config) is None


def test_self_is_noise_where_no_model_is_named():
    found = load_images("self", split="test")
    assert found.fingerprint == load_images("noise", split="test").fingerprint


@pytest.mark.parametrize("typed", [True, False])
def test_parquet_files_with_and_without_the_types_of_datasets(tmp_path, typed, reader):
    import datasets
    import pyarrow
    from pyarrow import parquet

    files = sorted(save_pictures(tmp_path / "set", 4).iterdir())
    cells = [{"bytes": file.read_bytes(), "path": None} for file in files]
    place = tmp_path / "set.parquet"
    if typed:
        features = datasets.Features({"photo": datasets.Image(), "kind": datasets.ClassLabel(names=list(CLASSES))})
        rows = datasets.Dataset.from_dict({"photo": cells, "kind": [2, 0, 1, 5]}, features=features)
        rows.to_parquet(place)
    else:
        parquet.write_table(pyarrow.table({"image": cells, "label": [2, 0, 1, 5]}), place)
    data = load_images(str(place), split="test")
    assert data.labels == (("ship", "cat", "dog", "bird") if typed else (2, 0, 1, 5))
    folder = load_images(str(tmp_path / "set"), split="test")
    for (_, one), (_, other) in zip(
        read_images(data, reader, range(4)), read_images(folder, reader, range(4)), strict=True
    ):
        assert torch.equal(one, other)


def test_the_same_seed_draws_the_same_pictures_and_fewer_are_the_first_of_more(tmp_path, reader):
    data = load_images(str(save_pictures(tmp_path / "set", 9)), split="test")
    whole = draw_images(data, reader, samples=9, seed=1)
    assert sorted(whole.indices) == list(range(9))
    some = draw_images(data, reader, samples=4, seed=1)
    assert torch.equal(some.inputs, whole.inputs[:4])
    assert draw_images(data, reader, samples=9, seed=2).indices != whole.indices
    with pytest.raises(CalibrationError, match=r"10 images are requested, but set .* has 9; .*`samples` 9"):
        draw_images(data, reader, samples=10, seed=1)


def test_inputs_are_what_the_image_processor_makes(tmp_path, reader):
    folder = save_pictures(tmp_path / "set", 1)
    data = load_images(str(folder), split="test")
    (_, found), *_ = read_images(data, reader, [0])
    picture = Image.open(folder / "000.png").resize((16, 16), Image.Resampling.BILINEAR)
    pixels = torch.tensor(list(picture.convert("RGB").tobytes()), dtype=torch.float32).view(16, 16, 3).permute(2, 0, 1)
    torch.testing.assert_close(found, (pixels / 255 - 0.5) / 0.25, rtol=0, atol=0.02)


def test_unreadable_pictures_are_named_and_left_out_up_to_a_limit(tmp_path, reader, capsys):
    folder = save_pictures(tmp_path / "set", MAX_UNREADABLE + 3)
    files = sorted(folder.iterdir())
    whole = files[0].read_bytes()
    files[0].write_bytes(b"no picture")
    files[1].write_bytes(whole[: len(whole) // 2])
    data = load_images(str(folder), split="test")
    found = [index for index, _ in read_images(data, reader, range(len(data)))]
    assert found == list(range(2, len(files)))
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert str(files[0]) in told[0]
    assert str(files[1]) in told[1]
    for file in files[: MAX_UNREADABLE + 1]:
        file.write_bytes(b"no picture")
    with pytest.raises(CalibrationError, match=f"{MAX_UNREADABLE + 1} images of set .* cannot be read"):
        list(read_images(data, reader, range(len(data))))
    for file in files[3:]:
        file.unlink()
    with pytest.raises(CalibrationError, match=r"No image of set .* can be read \(the first: .*000\.png\)"):
        list(read_images(load_images(str(folder), split="test"), reader, range(3)))


def test_greys_become_colours_and_colours_greys(tmp_path, reader):
    grey = load_images(str(save_pictures(tmp_path / "grey", 1, mode="L")), split="test")
    (_, pixels), *_ = read_images(grey, reader, [0])
    assert torch.equal(pixels[0], pixels[1])
    write_processor(tmp_path, channels=1)
    one = ImageReader(load_image_processor(tmp_path), 1, "the model")
    colours = load_images(str(save_pictures(tmp_path / "colours", 1)), split="test")
    (_, pixels), *_ = read_images(colours, one, [0])
    assert pixels.shape == (1, 16, 16)


def test_a_wrong_number_of_channels_is_one_sentence(tmp_path, reader):
    data = load_images(str(save_pictures(tmp_path / "set", 1)), split="test")
    four = ImageReader(load_image_processor(_processor(tmp_path, 4)), 4, "the model")
    with pytest.raises(CalibrationError, match=r"000\.png has 3 channels, and the model takes 4"):
        list(read_images(data, four, [0]))
    three = ImageReader(load_image_processor(_processor(tmp_path, 3)), 1, "the model")
    with pytest.raises(CalibrationError, match=r"image processor of the model .*config\.json"):
        list(read_images(data, three, [0]))


def _processor(folder, channels):
    place = folder / f"processor{channels}"
    place.mkdir()
    write_processor(place, channels=channels)
    return place


def test_pictures_that_come_out_in_several_sizes_are_refused(tmp_path):
    class AsTheyAre:
        def __call__(self, images, return_tensors):
            return {"pixel_values": torch.zeros(1, 3, *images.size)}

    folder = save_pictures(tmp_path / "set", 2)
    Image.new("RGB", (5, 5)).save(folder / "001.png")
    data = load_images(str(folder), split="test")
    with pytest.raises(CalibrationError, match=r"001\.png comes out .* as 3 x 5 x 5 and others as 3 x 20 x 18"):
        list(read_images(data, ImageReader(AsTheyAre(), 3, "the model"), [0, 1]))


def test_what_is_no_set_of_pictures_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.md").write_text("no pictures")
    refused(tmp_path / "empty", r"empty \(0 images\) holds no images")
    refused(tmp_path / "text.txt", r"is a text, and a vision model reads images")
    refused("wikitext2", r"is a text, and a vision model reads images")
    (tmp_path / "notes.md").write_text("no pictures")
    refused(tmp_path / "notes.md", r"is not a folder of images")
    refused(tmp_path / "absent", r"There are no images at .*absent")
    refused(tmp_path / "absent.parquet", r"There is no file .*absent\.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    refused(tmp_path / "bad.parquet", r"is not a valid parquet file")
    mixed = save_pictures(tmp_path / "mixed", 2, layout="folders")
    Image.new("RGB", (5, 5)).save(mixed / "here.png")
    refused(mixed, r"has images both directly and in sub-folders \(such as here\.png\)")
    monkeypatch.setattr(images_table, "reachable", lambda _: False)
    refused("nobody/pictures:test", r"no such folder or file, and the data set nobody/pictures of the hub could not")


def test_a_data_set_of_the_hub_by_name_and_split(tmp_path, monkeypatch, reader):
    import datasets

    files = sorted(save_pictures(tmp_path / "set", 3).iterdir())
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    sizes = {"train": 3, "validation": 2}
    monkeypatch.setattr(images_table, "reachable", lambda _: True)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda _: list(sizes))

    def load(name, split):
        assert name == "somebody/pictures"
        cells = [str(file) for file in files[: sizes[split]]]
        return datasets.Dataset.from_dict({"img": cells, "label": range(sizes[split])}, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load)
    for spec, split, name in (
        ("somebody/pictures", "calibration", "train"),
        ("somebody/pictures", "test", "validation"),
        ("somebody/pictures:train", "test", "train"),
    ):
        data = load_images(spec, split=split)
        assert data.name == f"somebody/pictures {name}"
        assert data.labels == CLASSES[: sizes[name]]
        assert len(list(read_images(data, reader, range(len(data))))) == sizes[name]
    refused("somebody/pictures:absent", r"data set somebody/pictures of the hub could not be downloaded")


def test_a_table_without_pictures_is_one_sentence(tmp_path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["a"], "label": [1]}), tmp_path / "text.parquet")
    refused(tmp_path / "text.parquet", r"has no column of images \(found text, label\)")
    parquet.write_table(pyarrow.table({"image": [1.5], "label": [1]}), tmp_path / "numbers.parquet")
    refused(tmp_path / "numbers.parquet", r"The column 'image' of numbers\.parquet does not contain images")


def pixels_of(folder, reader):
    data = load_images(str(folder), split="test")
    return torch.stack([pixels for _, pixels in read_images(data, reader, range(len(data)))])


def noise(seed=0, size=(24, 24), high=256):
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
def test_pictures_are_turned_upright_as_their_tag_says(tmp_path, reader, orientation):
    for name in ("plain", "tagged"):
        (tmp_path / name).mkdir()
    upright = Image.fromarray(noise(size=(24, 24, 3)).astype("uint8"))
    upright.save(tmp_path / "plain" / "a.png")
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright.transpose(TURNED[orientation])
    stored.save(tmp_path / "tagged" / "a.png", exif=exif)
    assert torch.equal(pixels_of(tmp_path / "tagged", reader), pixels_of(tmp_path / "plain", reader))


def write_wide(folder, kind, grey):
    """Grey values from 0 to 255 in a file that holds more than 8 bits of each."""
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
def test_sixteen_bits_are_scaled_to_eight(tmp_path, kind, channels):
    (tmp_path / "processor").mkdir()
    write_processor(tmp_path / "processor", channels=channels)
    reader = ImageReader(load_image_processor(tmp_path / "processor"), channels, "the model")
    grey = noise()
    write_wide(tmp_path / "wide", kind, grey)
    (tmp_path / "narrow").mkdir()
    Image.fromarray(grey.astype("uint8")).save(tmp_path / "narrow" / "a.png")
    assert torch.equal(pixels_of(tmp_path / "wide", reader), pixels_of(tmp_path / "narrow", reader))


@pytest.mark.parametrize(("dtype", "kind"), [("float32", "floating-point"), ("int32", "32-bit or signed")])
def test_numbers_of_unknown_range_are_refused_by_name(tmp_path, reader, dtype, kind):
    Image.fromarray(noise(high=9).astype(dtype)).save(tmp_path / "a.tiff")
    with pytest.raises(CalibrationError, match=rf"a\.tiff holds {kind} numbers.*save it with 8 or 16 bits"):
        pixels_of(tmp_path, reader)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_dropped(tmp_path, reader, mode):
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


def test_large_pictures_draw_no_warning_and_larger_ones_are_named(tmp_path, reader, monkeypatch, capsys, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    for name, side in (("fits", 19), ("large", 28), ("bomb", 29)):
        Image.new("1", (side, side)).save(tmp_path / f"{name}.png")
    assert len(pixels_of(tmp_path, reader)) == 2
    assert re.search(r"bomb\.png cannot be read \(it has more than the 800 pixels", capsys.readouterr().err)
    assert not [each for each in recwarn if issubclass(each.category, Image.DecompressionBombWarning)]
