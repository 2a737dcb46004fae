"""Named sets and folders of pictures, and the model inputs made from them."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from shiftadd_cli.data import images_builtin, images_folder, images_noise, images_table, text_files, text_hub
from shiftadd_cli.data.images_data import ImageData
from shiftadd_cli.data.mixture import SELF
from shiftadd_cli.data.text import Split
from shiftadd_cli.errors import CalibrationError, first_line
from shiftadd_cli.progress import progress
from shiftadd_cli.source import Source

# Unreadable pictures are named and skipped; more than this means that something is wrong with the set.
MAX_UNREADABLE = 10
# Pillow's modes of grey pictures with more than 8 bits. When it converts them, it clips values above 255.
_WIDE_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.+-]+)?")
_DIGITS = frozenset("0123456789")
# The prefix that transformers gives to unnamed classes.
_UNNAMED = "LABEL_"
_KINDS = "a folder of images, a .parquet file, or a data set of the hub as NAME or NAME:SPLIT"
_NO_DOWNLOAD = "'noise' or 'builtin', which need no download"


class Drawn(NamedTuple):
    """Model inputs, float32 `[samples, channels, height, width]`, and the number of the picture behind each."""

    inputs: Tensor
    indices: tuple[int, ...]


def load_images(spec: str, *, split: Split, config: Any = None) -> ImageData:
    """The pictures called `spec`: `builtin` (digits), `noise` (scenes of random shapes), `self`, a folder, a .parquet
    file, or a data set of the hub, `NAME` or `NAME:SPLIT`.

    `self` is the best choice without the user's own pictures: the digits for a digit model, `noise` for any other.

    `split` chooses between disjoint parts of a named set; a folder or a file is the same for both. `config` is the
    configuration of the model that will see them; only `self` uses it, and without it means `noise`.

    Raises:
        CalibrationError: there is no such set, it is empty, or it contains text.
    """
    if spec == SELF:
        spec = images_builtin.NAME if config is not None and reads_digits(config) else images_noise.NAME
    path = Path(spec)
    if spec == images_builtin.NAME:
        data = images_builtin.read(split)
    elif spec == images_noise.NAME:
        data = images_noise.read(split)
    elif path.is_dir():
        data = images_folder.read(path)
    elif path.suffix.lower() == ".parquet":
        data = images_table.read_parquet(path)
    elif spec in text_hub.CORPORA or path.suffix.lower() in text_files.READERS:
        raise CalibrationError(f"{spec} is a text, and a vision model reads images; give {_KINDS}.")
    elif path.exists():
        raise CalibrationError(f"{spec} is not a folder of images or a .parquet file; give {_KINDS}.")
    elif not _HUB_ID.fullmatch(spec):
        raise CalibrationError(f"There are no images at {spec}; give {_KINDS}, or {_NO_DOWNLOAD}.")
    else:
        data = images_table.read_hub(spec, split)
    if not len(data):
        raise CalibrationError(f"{data.name} holds no images; give {_KINDS}.")
    return data


def images_remark(spec: str, config: Any) -> str | None:
    """A sentence for the plan of a vision model of this configuration, calibrated on the pictures called `spec`.

    It describes the pictures, where `spec` does not, and names better ones for the model. None where there is nothing
    to say, as for the user's own pictures.
    """
    digits = reads_digits(config)
    if spec == SELF and digits:
        return "The images are the handwritten digits of scikit-learn, because the classes of the model are digits."
    if spec in (SELF, images_noise.NAME):
        kind, cure = ("digits", images_builtin.NAME) if digits else ("photographs", "FOLDER")
        return (
            f"The images are random shapes, not {kind}; a model of {kind} is better calibrated on {kind}: give "
            f"`calibration={cure}`."
        )
    if spec == images_builtin.NAME and not digits:
        return (
            "The built-in images are handwritten digits; a model of photographs is better calibrated on photographs, "
            f"or without any, on random shapes: give `calibration=FOLDER` or `calibration={images_noise.NAME}`."
        )
    return None


def reads_digits(config: Any) -> bool:
    """Whether a vision model of this configuration reads digits: its classes are named after the ten digits, or it has
    ten unnamed classes and grey images. Any other counts as a model of photographs, since most are."""
    names = {str(name) for name in (getattr(config, "id2label", None) or {}).values()}
    unnamed = {name.removeprefix(_UNNAMED) for name in names} == _DIGITS
    return names == _DIGITS or (unnamed and _channels(config) == 1)


def draw_images(data: ImageData, reader: ImageReader, *, samples: int, seed: int) -> Drawn:
    """Draw pictures without repetition, in the order of a permutation seeded with `seed`. A smaller number of samples
    gives the first of a larger number.

    Raises:
        CalibrationError: there are too few, or too many cannot be read; see `read_images`.
    """
    if len(data) < samples:
        raise CalibrationError(
            f"{samples} images are requested, but {data.name} has {len(data)}; give more images, or "
            f"`samples` {len(data)}."
        )
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    inputs, indices = [], []
    read = read_images(data, reader, order)
    for index, pixels in progress(_first(read, samples), total=samples, desc="Reading images"):
        inputs.append(pixels)
        indices.append(index)
    if len(inputs) < samples:
        raise CalibrationError(
            f"{samples} images are requested, but only {len(inputs)} of {data.name} can be read; give more images, or "
            f"`samples` {len(inputs)}."
        )
    return Drawn(torch.stack(inputs), tuple(indices))


def read_images(data: ImageData, reader: ImageReader, order: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """Numbers and model inputs `[channels, height, width]` of pictures, in the given order. Unreadable pictures are
    skipped, with a warning that names them.

    Raises:
        CalibrationError: more than `MAX_UNREADABLE` or all pictures are unreadable, the inputs differ in size, or the
            range of a picture's values is unknown.
    """
    unreadable: list[str] = []
    shape: torch.Size | None = None
    for index in order:
        try:
            picture = _decode(data, index)
        except CalibrationError:
            raise
        except Exception as error:  # decoders can raise anything
            unreadable.append(data.places[index])
            reason = first_line(error)
            if len(unreadable) > MAX_UNREADABLE:
                raise CalibrationError(
                    f"{len(unreadable)} images of {data.name} cannot be read (the last: {data.places[index]}, "
                    f"{reason}); repair or remove them."
                ) from error
            print(f"Warning: {data.places[index]} cannot be read ({reason}) and is skipped.", file=sys.stderr)
            continue
        pixels = reader(picture, data.places[index])
        shape = shape or pixels.shape
        if pixels.shape != shape:
            raise CalibrationError(
                f"{data.places[index]} comes out of the image processor of {reader.name} as {_size(pixels.shape)} and "
                f"others as {_size(shape)}; make preprocessor_config.json resize or crop to one size."
            )
        yield index, pixels
    if shape is None:
        raise CalibrationError(
            f"No image of {data.name} can be read (the first: {unreadable[0]}); repair or remove them."
        )


class ImageReader:
    """Makes the input of a model from a picture.

    name: name of the model, for messages; channels: its number of input channels. Pictures are converted to colour or
    grey if the model takes 3 channels or 1, which drops transparency as transformers does; the image processor does the
    rest.
    """

    _MODES = {1: "L", 3: "RGB"}  # noqa: RUF012 - a constant

    def __init__(self, processor: Any, channels: int, name: str) -> None:
        self.name = name
        self._processor, self._channels = processor, channels

    @classmethod
    def of(cls, processor: Any, config: Any, name: str) -> ImageReader:
        """The reader for a model of this configuration."""
        return cls(processor, _channels(config), name)

    def __call__(self, picture: Any, place: str) -> Tensor:
        """The input, float32 `[channels, height, width]`. Raises CalibrationError if the number of channels differs."""
        mode = self._MODES.get(self._channels)
        if mode is None and len(picture.getbands()) != self._channels:
            raise CalibrationError(
                f"{place} has {len(picture.getbands())} channels, and {self.name} takes {self._channels}; give images "
                "with as many."
            )
        try:
            outputs = self._processor(images=picture.convert(mode) if mode else picture, return_tensors="pt")
            pixels: Tensor = outputs["pixel_values"][0]
        except Exception as error:  # processors can raise anything
            reason = first_line(error)
            raise CalibrationError(
                f"The image processor of {self.name} cannot read {place} ({reason}); check preprocessor_config.json "
                "against config.json."
            ) from error
        if pixels.ndim != 3 or pixels.shape[0] != self._channels:
            raise CalibrationError(
                f"The image processor of {self.name} gives {_size(pixels.shape)} for an image, and the model takes "
                f"{self._channels} channels; preprocessor_config.json and config.json do not belong together."
            )
        return pixels.float()

    def blank(self) -> Tensor:
        """The input for an empty picture, to find its shape."""
        from PIL import Image

        mode = self._MODES.get(self._channels) or ("RGBA" if self._channels == 4 else "RGB")
        return self(Image.new(mode, (64, 64)), "an empty image")


def image_reader(source: Source) -> ImageReader:
    """The reader of a vision model. Raises SourceError where it has no image processor."""
    return ImageReader.of(source.load_image_processor(), source.config, source.spec)


def _channels(config: Any) -> int:
    # A classifier made from a dual model has a separate configuration for its vision tower.
    configs = (config, getattr(config, "vision_config", None))
    counts = (getattr(candidate, "num_channels", None) for candidate in configs)
    return int(next(filter(None, counts), 3))


def _decode(data: ImageData, index: int) -> Any:
    """Picture number `index`, upright and with 8 bits per channel.

    Raises CalibrationError where the meaning of its values is unknown; decoders can raise anything.
    """
    from PIL import Image, ImageOps

    with warnings.catch_warnings():
        # Pillow warns about photographs of 90 million pixels, and refuses twice as many.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            picture = Image.open(BytesIO(data.read(index)))
        except Image.DecompressionBombError as error:
            raise OSError(f"it has more than the {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels allowed") from error
        picture.load()
    upright = ImageOps.exif_transpose(picture)
    if picture.mode not in _WIDE_MODES:
        return upright
    bits, inverted = _grey_scale(picture, data.places[index])
    # int64 has room for the product; the highest value becomes 255.
    grey = numpy.asarray(upright).astype(numpy.int64) * 255 // (2**bits - 1)
    return Image.fromarray((255 - grey if inverted else grey).astype(numpy.uint8))


def _grey_scale(picture: Any, name: str) -> tuple[int, bool]:
    """Bits of a grey picture with more than 8 bits, and whether its highest value is black.

    Raises CalibrationError for pictures whose range is unknown.
    """
    tags = getattr(picture, "tag_v2", {}) if picture.format == "TIFF" else {}
    if picture.mode.startswith("I;16"):
        return int(tags.get(_BITS_PER_SAMPLE, (16,))[0]), tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    if picture.mode == "I" and picture.format in ("PNG", "PPM"):
        return 16, False
    kind = "floating-point" if picture.mode == "F" else "32-bit or signed"
    raise CalibrationError(
        f"{name} holds {kind} numbers, and their black and white levels are unknown; save it with 8 or 16 bits."
    )


def _first(items: Iterator[Any], count: int) -> Iterator[Any]:
    for _, item in zip(range(count), items, strict=False):
        yield item


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
