"""Pictures that need no download: the 1797 handwritten digits, 8 x 8, included in scikit-learn.

They are enough for experiments and for digit models. The behaviour of a photograph model on digits says little about
photographs, so calibrate such a model on photographs, or on `noise` if you have none.
"""

from __future__ import annotations

from io import BytesIO

from shiftadd_cli.data.images_data import ImageData
from shiftadd_cli.errors import CalibrationError

NAME = "builtin"
# The last digits of the set, written by other people than the first: see the data set's description.
TEST_IMAGES = 500
_WHITE = 16


def read(split: str) -> ImageData:
    """The digits of a split, "calibration" or "test"."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise CalibrationError(
            "The built-in images need scikit-learn; run `pip install 'shiftadd-cli[vision]'`, or give a folder "
            "of images."
        ) from error
    digits = load_digits()
    total = len(digits.images)
    first, last = (total - TEST_IMAGES, total) if split == "test" else (0, total - TEST_IMAGES)
    which = "the last 500, held out" if split == "test" else "without the last 500"
    images = digits.images[first:last]

    def encode(index: int) -> bytes:
        from PIL import Image

        grey = (images[index] * (255 / _WHITE)).round().astype("uint8")
        file = BytesIO()
        Image.fromarray(grey).save(file, "PNG")
        return file.getvalue()

    keys = [f"digit {number}" for number in range(first, last)]
    labels = tuple(map(int, digits.target[first:last]))
    return ImageData(f"builtin (digits of scikit-learn, {which})", keys, keys, encode, labels)
