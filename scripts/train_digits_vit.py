"""Trains a small vision transformer on the handwritten digits of scikit-learn, in less than a minute on a CPU.

    python scripts/train_digits_vit.py out/vit-digits
    shiftadd quantize out/vit-digits -o out/vit-digits-3bit
    shiftadd evaluate out/vit-digits-3bit --against out/vit-digits

It needs no download. It trains on the images that `builtin` calibrates on, and holds out the 500 that `builtin` tests
on.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from torch import Tensor
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification
from transformers.models.vit import ViTImageProcessorPil

from shiftadd_cli.data.images import ImageReader, load_images, read_images
from shiftadd_cli.data.images_data import ImageData
from shiftadd_cli.progress import progress

SIZE, CLASSES = 8, 10
# The middle of the data set's grey levels.
MEAN, DEVIATION = 0.5, 0.5


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--epochs", type=click.IntRange(min=1), default=50, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(out: Path, epochs: int, seed: int) -> None:
    """Write the trained model to the folder OUT."""
    torch.manual_seed(seed)
    processor = ViTImageProcessorPil(
        size={"height": SIZE, "width": SIZE}, image_mean=[MEAN], image_std=[DEVIATION], do_convert_rgb=False
    )
    model = ViTForImageClassification(
        ViTConfig(
            image_size=SIZE,
            patch_size=2,
            num_channels=1,
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=128,
            id2label={number: str(number) for number in range(CLASSES)},
            label2id={str(number): number for number in range(CLASSES)},
        )
    )
    reader = ImageReader.of(processor, model.config, "the model")
    pixels, classes = _all(load_images("builtin", split="calibration"), reader)
    _train(model, pixels, classes, epochs)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    AutoImageProcessor.from_pretrained(out, backend="pil")
    pixels, classes = _all(load_images("builtin", split="test"), reader)
    with torch.inference_mode():
        right = (model(pixel_values=pixels).logits.argmax(-1) == classes).float().mean().item()
    click.echo(f"{out}: {right:.1%} of the {len(classes)} held-out digits are classified correctly")


def _train(model: ViTForImageClassification, pixels: Tensor, classes: Tensor, epochs: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    steps = epochs * -(-len(pixels) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for _ in progress(range(epochs), total=epochs, desc="Training"):
        for batch in torch.randperm(len(pixels)).split(64):
            # Noise compensates for the small number of images.
            noisy = pixels[batch] + 0.3 * torch.randn_like(pixels[batch])
            loss = torch.nn.functional.cross_entropy(model(pixel_values=noisy).logits, classes[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def _all(data: ImageData, reader: ImageReader) -> tuple[Tensor, Tensor]:
    assert data.labels is not None
    pixels = torch.stack([image for _, image in read_images(data, reader, range(len(data)))])
    return pixels, torch.tensor([int(label) for label in data.labels])


if __name__ == "__main__":
    main()
