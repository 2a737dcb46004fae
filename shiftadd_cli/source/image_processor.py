"""The image processor of a model, which turns images into its input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shiftadd_cli.errors import SourceError, first_line
from shiftadd_cli.source.companions import IMAGE_PROCESSOR_FILES as _FILES


def load_image_processor(path: Path) -> Any:
    """The image processor of a model folder. It works on Pillow images and numpy, without torchvision.

    Raises:
        SourceError: there is none, or it cannot be read, or Pillow is not installed.
    """
    from transformers import AutoImageProcessor

    if not any((path / name).is_file() for name in _FILES):
        raise SourceError(f"{path} holds no image processor; put {_FILES[0]} of the original model there.")
    try:
        return AutoImageProcessor.from_pretrained(path, backend="pil", local_files_only=True)
    except ImportError as error:
        raise SourceError("Reading images needs Pillow; run `pip install 'shiftadd-cli[vision]'`.") from error
    except Exception as error:  # processors raise any exception, depending on the settings
        reason = first_line(error)
        raise SourceError(
            f"The image processor of {path} cannot be read ({reason}); put {_FILES[0]} of the original model there."
        ) from error
