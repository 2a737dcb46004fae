"""Noise pictures with the statistics of photographs, which need neither a camera nor a download.

Each is a "dead leaves" scene: opaque shapes that cover each other. Their sizes follow a power law, which gives the
edges and the spectrum of natural images (Lee, Mumford and Huang, "Occlusion models for natural images",
2001). Baradad et al. ("Learning to see by looking at noise", arXiv:2106.05963) train vision models on such scenes, and
on noise with a power-law spectrum, which here is the texture of the shapes. We added a gradient of light over each
shape, and defocus.
"""

from __future__ import annotations

from io import BytesIO

import numpy
from numpy.random import Generator
from numpy.typing import NDArray

from shiftadd_cli.data.images_data import ImageData

NAME = "noise"
# More than any calibration run draws. A test reads the whole set, so its set is smaller.
IMAGES = {"calibration": 65536, "test": 1000}
# In pixels. Most image processors output 224; power-law scenes look alike at any size.
SIDE = 256
_KEYS = {"calibration": 0, "test": 1}
# A new algorithm makes a new set: measurements on the old set must not be taken for measurements on the new.
_VERSION = 1
# A fingerprint needs only a few, because one algorithm makes them all.
_FINGERPRINT_SAMPLES = 8

# Axes along which the colours of photographs vary independently, and their deviations (Ruderman, Cronin and Chiao,
# "Statistics of cone responses to natural images", 1998): light, blue against yellow, green against magenta.
_AXES = numpy.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / numpy.sqrt([[3], [2], [6]])
_DEVIATIONS = numpy.array([1.0, 0.25, 0.1])
_FEWEST, _MOST = 5, 60
# Radii as shares of the side, with a density of radius**-2.
_SMALLEST, _LARGEST = 0.06, 0.6
_BLOB_POINTS = 64
_TEXTURES = 4

Array = NDArray[numpy.float64]


def read(split: str) -> ImageData:
    """The scenes of a split, "calibration" or "test"; the splits share no scene.

    They are colour PNG files of `SIDE` x `SIDE` pixels, without labels. Each is generated when it is read, and depends
    only on its split and number.
    """
    key = _KEYS[split]

    def encode(index: int) -> bytes:
        from PIL import Image

        file = BytesIO()
        Image.fromarray(_scene(numpy.random.default_rng([_VERSION, key, index]))).save(file, "PNG")
        return file.getvalue()

    keys = [f"noise {_VERSION} {split} {number}" for number in range(IMAGES[split])]
    name = f"noise (scenes of random shapes, the part for {'tests' if split == 'test' else 'calibration'})"
    return ImageData(name, keys, keys, encode, fingerprint_samples=_FINGERPRINT_SAMPLES)


def _scene(rng: Generator) -> NDArray[numpy.uint8]:
    """A picture, `[SIDE, SIDE, 3]`."""
    from PIL import Image, ImageFilter

    shapes = int(numpy.exp(rng.uniform(numpy.log(_FEWEST), numpy.log(_MOST)))) + 1
    shown = _layout(rng, shapes)
    # Photographs differ in brightness, tint and contrast more than their parts do.
    middle = rng.normal(0.46, 0.12) + 0.1 * _colours(rng, 1)
    colours = middle + rng.lognormal(numpy.log(0.3), 0.3) * _colours(rng, shapes)
    tints = _AXES[0] + 0.3 * _colours(rng, shapes)
    light = _textures(rng, shapes, shown) + _gradients(rng, shapes, shown)
    pixels = colours[shown] + light[..., None] * tints[shown]
    picture = Image.fromarray((255 * pixels.clip(0, 1)).round().astype("uint8"))
    # Half a pixel of blur smooths the jagged outlines.
    return numpy.asarray(picture.filter(ImageFilter.GaussianBlur(0.5 + abs(rng.normal(0, 2.5)))))


def _layout(rng: Generator, shapes: int) -> NDArray[numpy.int32]:
    """The number of the shape visible at each pixel, `[SIDE, SIDE]`; 0 is the background."""
    from PIL import Image, ImageDraw

    labels = Image.new("I", (SIDE, SIDE))
    pencil = ImageDraw.Draw(labels)
    for number in range(1, shapes):
        pencil.polygon([(x, y) for x, y in _outline(rng)], fill=number)
    return numpy.asarray(labels)


def _outline(rng: Generator) -> Array:
    """Points in pixels, `[points, 2]`, around a blob, a rectangle or an irregular polygon."""
    share = rng.uniform()
    radius = SIDE / ((1 - share) / _SMALLEST + share / _LARGEST)
    kind = rng.integers(3)
    if kind == 0:
        angles = numpy.linspace(0, 2 * numpy.pi, _BLOB_POINTS, endpoint=False)
        reach = numpy.ones(_BLOB_POINTS)
        for waves in range(2, 7):
            reach += rng.normal(0, 0.35 / waves) * numpy.cos(waves * angles + rng.uniform(0, 2 * numpy.pi))
    elif kind == 1:
        angles = numpy.pi * numpy.array([0.25, 0.75, 1.25, 1.75])
        reach = numpy.full(4, 1.25)
    else:
        corners = int(rng.integers(3, 8))
        angles = numpy.sort(rng.uniform(0, 2 * numpy.pi, corners))
        reach = rng.uniform(0.6, 1.3, corners)
    directions = numpy.stack([numpy.cos(angles), numpy.sin(angles)], -1)
    stretch = 2 ** rng.uniform(-0.75, 0.75)
    turn = rng.uniform(0, 2 * numpy.pi)
    turned = numpy.array([[numpy.cos(turn), numpy.sin(turn)], [-numpy.sin(turn), numpy.cos(turn)]])
    return radius * (reach[:, None] * directions * [stretch, 1 / stretch]) @ turned + rng.uniform(-0.1, 1.1, 2) * SIDE


def _colours(rng: Generator, count: int) -> Array:
    """Differences from a mean colour, `[count, 3]`, with a deviation of 1 in brightness."""
    return (rng.standard_normal((count, 3)) * _DEVIATIONS) @ _AXES


def _textures(rng: Generator, shapes: int, shown: NDArray[numpy.int32]) -> Array:
    """Light that each shape takes from one of a few textures, `[SIDE, SIDE]`."""
    textures = numpy.stack([_power_law_noise(rng, rng.uniform(0.6, 1.8)) for _ in range(_TEXTURES)])
    which, strength = rng.integers(0, _TEXTURES, shapes), rng.normal(0, 0.12, shapes)
    return numpy.take_along_axis(textures, which[shown][None], 0)[0] * strength[shown]


def _gradients(rng: Generator, shapes: int, shown: NDArray[numpy.int32]) -> Array:
    """Light that grows linearly across each shape, in its own direction, `[SIDE, SIDE]`."""
    down, right = rng.normal(0, 0.25, (2, shapes))
    positions = numpy.linspace(-0.5, 0.5, SIDE)
    return down[shown] * positions[:, None] + right[shown] * positions


def _power_law_noise(rng: Generator, falloff: float) -> Array:
    """Noise `[SIDE, SIDE]` with mean 0 and deviation 1. Its amplitude falls with frequency**-falloff, faster along one
    direction than across it."""
    down, right = numpy.fft.fftfreq(SIDE)[:, None], numpy.fft.rfftfreq(SIDE)
    turn, stretch = rng.uniform(0, numpy.pi), 2 ** rng.uniform(-0.5, 0.5)
    frequency = numpy.hypot(
        stretch * (right * numpy.cos(turn) + down * numpy.sin(turn)),
        (down * numpy.cos(turn) - right * numpy.sin(turn)) / stretch,
    )
    frequency[0, 0] = numpy.inf  # no mean
    waves = rng.standard_normal(frequency.shape) + 1j * rng.standard_normal(frequency.shape)
    noise = numpy.fft.irfft2(waves * frequency**-falloff, s=(SIDE, SIDE))
    normal: Array = noise / noise.std()
    return normal
