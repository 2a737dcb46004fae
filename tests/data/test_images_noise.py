"""Scenes of random shapes are reproducible and have the statistics of photographs."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tiny_vision import IMAGE_SIZE, write_processor

from shiftadd_cli.data import images_noise
from shiftadd_cli.data.images import ImageReader, draw_images, load_images
from shiftadd_cli.source.image_processor import load_image_processor

Array = NDArray[numpy.float64]


@pytest.fixture(scope="module")
def scenes() -> Array:
    """Colours from 0 to 1, `[scenes, height, width, 3]`."""
    data = load_images("noise", split="calibration")
    pictures = [Image.open(BytesIO(data.read(number))) for number in range(24)]
    assert {picture.mode for picture in pictures} == {"RGB"}
    return numpy.stack([numpy.asarray(picture) for picture in pictures]) / 255


def power_falloff(greys: Array) -> float:
    """The exponent a of the mean power spectrum frequency**-a of pictures `[pictures, side, side]`.

    A window keeps the borders from counting as edges. Fine detail is left out, since defocus removes it.
    """
    side = greys.shape[-1]
    window = numpy.hanning(side)[:, None] * numpy.hanning(side)
    centred = greys - greys.mean((1, 2), keepdims=True)
    power = (numpy.abs(numpy.fft.fft2(centred * window)) ** 2).mean(0)
    frequency = numpy.hypot(numpy.fft.fftfreq(side)[:, None], numpy.fft.fftfreq(side))
    band = (frequency > 4 / side) & (frequency < 0.04)
    slope, _ = numpy.polyfit(numpy.log(frequency[band]), numpy.log(power[band]), 1)
    return -slope


def kurtosis(values: Array) -> float:
    centred = values - values.mean()
    return (centred**4).mean() / (centred**2).mean() ** 2


def test_spectra_fall_off_like_those_of_photographs(scenes: Array) -> None:
    """Field, "Relations between the statistics of natural images and the response properties of cortical cells", 1987:
    the power falls with the square of the frequency, or somewhat faster. For a single edge, it falls with the cube."""
    assert 2 < power_falloff(scenes.mean(-1)) < 4
    white = numpy.random.default_rng(0).uniform(size=scenes.shape[:-1])
    assert abs(power_falloff(white)) < 0.2


def test_steps_between_pixels_are_rare_and_large_as_at_edges(scenes: Array) -> None:
    """Noise with the same spectrum but random phases has the kurtosis of a normal distribution, 3."""
    greys = scenes.mean(-1)
    assert kurtosis(numpy.diff(greys, axis=-1)) > 10
    waves = numpy.abs(numpy.fft.fft2(greys))
    phases = numpy.angle(numpy.fft.fft2(numpy.random.default_rng(0).normal(size=greys.shape)))
    shuffled = numpy.fft.ifft2(waves * numpy.exp(1j * phases)).real
    steps = numpy.diff(shuffled, axis=-1)
    assert kurtosis(steps / steps.std((1, 2), keepdims=True)) < 3.5


def test_colours_correlate_and_brightness_and_contrast_vary(scenes: Array) -> None:
    pixels = scenes.reshape(len(scenes), -1, 3)
    correlations = [numpy.asarray(numpy.corrcoef(picture.T))[numpy.triu_indices(3, 1)].mean() for picture in pixels]
    assert 0.7 < numpy.mean(correlations) < 0.99
    assert 0.3 < pixels.mean() < 0.6
    assert pixels.mean((1, 2)).std() > 0.05
    contrasts = pixels.mean(-1).std(1)
    assert 0.1 < contrasts.mean() < 0.3
    assert contrasts.max() > 2 * contrasts.min()


def test_a_scene_depends_only_on_its_split_and_number() -> None:
    one, other = (load_images("noise", split="calibration") for _ in range(2))
    assert one.read(7) == other.read(7)
    other.read(3)
    assert one.read(7) == other.read(7)
    assert one.fingerprint == other.fingerprint
    test = load_images("noise", split="test")
    assert test.fingerprint != one.fingerprint
    encoded = {data.read(number) for data in (one, test) for number in range(4)}
    assert len(encoded) == 8
    assert one.labels is test.labels is None


def test_only_drawn_scenes_are_generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generated: list[numpy.random.Generator] = []
    scene = images_noise._scene

    def recorded(rng: numpy.random.Generator) -> NDArray[numpy.uint8]:
        generated.append(rng)
        return scene(rng)

    monkeypatch.setattr(images_noise, "_scene", recorded)
    write_processor(tmp_path)
    reader = ImageReader(load_image_processor(tmp_path), 3, "the model")
    data = load_images("noise", split="calibration")
    drawn = draw_images(data, reader, samples=5, seed=1)
    assert len(generated) == 5
    assert drawn.inputs.shape == (5, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert not set(drawn.indices) & set(draw_images(data, reader, samples=5, seed=2).indices)
    assert torch.isfinite(drawn.inputs).all()
    generated.clear()
    assert data.fingerprint
    assert len(generated) < 20
