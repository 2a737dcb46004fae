"""The schema of report.json, version 1. Sizes are in bytes, times in seconds, errors are relative squared errors."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from shiftadd_cli.artifact.contents import alike
from shiftadd_cli.bcq.choices import Choice, Primitive, choice_of
from shiftadd_cli.storage.file_part import FilePart

SCHEMA_VERSION = 1


class LeftBehindReport(FilePart):
    """Tensors of the original's files that its model does not read, so that they are not in the checkpoint."""

    part: Annotated[str, Field(description="The name they would have in the model, or what their names begin with.")]
    tensors: Annotated[int, Field(description="How many they are.")]
    nbytes: Annotated[int, Field(description="Their size in the original's files.")]
    reason: str


class SourceReport(FilePart):
    """The model that was compressed."""

    spec: Annotated[str, Field(description="The model as it was named on the command line.")]
    name: str
    architecture: Annotated[str, Field(description="transformers class of the model.")]
    fingerprint: Annotated[str, Field(description="SHA-256 over configuration, weight file headers and samples.")]
    dtype: Annotated[str, Field(description="dtype of everything not quantized.")]
    parameters: Annotated[int, Field(description="Parameters, tied ones once.")]
    file_bytes: Annotated[int, Field(description="Size of the original's weight files.")]
    model_bytes: Annotated[int, Field(description="Size of the original's parameters at `dtype`.")]
    hub_id: Annotated[str | None, Field(description="null where it was not named by its id on the hub.")] = None
    license: Annotated[str | None, Field(description="As the original's model card or file says.")] = None
    reads_images: Annotated[bool, Field(description="A vision model, and no language model.")] = False
    left_behind: Annotated[list[LeftBehindReport], Field(description="Tensors that the model does not read.")] = Field(
        default_factory=list
    )


class CalibrationPart(FilePart):
    """One text of a mixture."""

    name: str
    fingerprint: Annotated[str, Field(description="SHA-256 of the text, or of the windows that the model wrote.")]
    share: Annotated[float, Field(description="Of the windows, as it was asked for.")]
    samples: Annotated[int, Field(description="Windows.")]


class CalibrationReport(FilePart):
    """The data the model was run on."""

    name: str
    fingerprint: Annotated[
        str,
        Field(
            description="SHA-256 of the text, of windows that the model wrote or that are a mixture, or over the names "
            "of all images and the bytes of some."
        ),
    ]
    samples: Annotated[int, Field(description="Windows of tokens, or images.")]
    seq_len: Annotated[int | None, Field(description="Tokens of a window; null for images.")]
    tokens: Annotated[int | None, Field(description="null for images.")]
    window_start: Annotated[
        str | None,
        Field(description="Special tokens that every window begins with, counted as its tokens; null for images."),
    ] = None
    image_shape: Annotated[
        tuple[int, ...] | None, Field(description="Channels, height and width of an image as the model reads it.")
    ] = None
    parts: Annotated[list[CalibrationPart], Field(description="Of a mixture of texts; empty for a single one.")] = (
        Field(default_factory=list)
    )

    @property
    def amount(self) -> str:
        """How much of it, in words."""
        if self.seq_len is None:
            return f"{self.samples} images"
        start = f", windows begin with {self.window_start}" if self.window_start else ""
        return f"{self.samples} x {self.seq_len} tokens{start}"


class SizeReport(FilePart):
    """What was written."""

    files_bytes: Annotated[int, Field(description="All weight files, headers included.")]
    quantized_bytes: Annotated[int, Field(description="Planes, scales, row scales and offsets.")]
    table_bytes: Annotated[int, Field(description="What is stored as 8-bit rows, scales included.")] = 0
    kept_bytes: Annotated[int, Field(description="Tensors stored as they were.")]
    quantized_weights: int
    bits_per_weight: Annotated[float, Field(description="Of the quantized layers, everything stored for them counted.")]
    planes_per_weight: Annotated[float, Field(description="Bits of the quantized layers, averaged over weights.")]
    whole_file_bits_per_weight: Annotated[float, Field(description="All weight files over all parameters.")]


class TradeOffPoint(FilePart):
    """Stored bits per weight of the quantized layers, and the loss predicted for them."""

    bits_per_weight: float
    predicted_loss: float


class UniformPoint(TradeOffPoint):
    """The same with equal bits for all layers."""

    bits: int


class BitPlanReport(FilePart):
    """The plan that gave the layers their bits."""

    fingerprint: Annotated[str, Field(description="SHA-256 of the plan.")]
    sensitivity: Annotated[str, Field(description="How it was measured what bits matter to a layer.")]
    predicted_loss: Annotated[float, Field(description="Sum over layers, in the unit of the sensitivity.")]
    uniform: Annotated[
        list[UniformPoint],
        Field(description="For every number of bits that all layers could have."),
    ] = Field(default_factory=list)
    bound: Annotated[
        list[TradeOffPoint],
        Field(
            default_factory=list,
            description="No plan lies below these points, joined: the lower convex hull without ties of layers.",
        ),
    ]


class LayerReport(FilePart):
    """One quantized linear."""

    name: str
    kind: Annotated[str, Field(description="Path of the linear inside its block.")]
    block: int
    out_features: int
    in_features: int
    primitive: Annotated[Primitive, Field(description="bcq, shift1 or shift2.")] = "bcq"
    bits: Annotated[int, Field(description="Binary planes, or bits of the codes of a shift layer.")]
    bits_per_weight: float
    weight_error: Annotated[float, Field(description="‖W - Ŵ‖² / ‖W‖².")]
    output_error: Annotated[
        float | None,
        Field(
            description="E‖(W - Ŵ)x‖² / E‖Wx‖² over the calibration inputs, both about their means where a bias was "
            "corrected; null without calibration."
        ),
    ]
    calibrated: Annotated[
        bool,
        Field(description="False if no calibration input reached the layer, or an expert's too few: less than inputs."),
    ]
    tokens: Annotated[
        int | None, Field(description="Calibration tokens that the layer read; null without calibration.")
    ] = None

    @property
    def choice(self) -> Choice:
        """Primitive and bits in one."""
        return choice_of(self.primitive, self.bits)


class BlockReport(FilePart):
    """A block that was reconstructed."""

    name: str
    error_before: Annotated[
        float,
        Field(description="Mean over tokens held back of ‖y - ŷ‖² / ‖y‖², y the original block's output."),
    ]
    error_after: Annotated[float, Field(description="The same after tuning.")]
    kept: Annotated[bool, Field(description="False if tuning made it worse and was undone.")]


class DistillationReport(FilePart):
    """Tuning of the whole model at the end."""

    divergence_before: Annotated[
        float,
        Field(
            description="Mean of KL(original || compressed), in nats, over the predictions for samples held back; of 1 "
            "- cosine of the features, for a model without a head."
        ),
    ]
    divergence_after: Annotated[
        float | None, Field(description="The same after tuning; null where that left the finite numbers.")
    ]
    kept: Annotated[bool, Field(description="False if tuning made it worse and was undone.")]


class KindReport(FilePart):
    """Averages over the layers of one kind; numbers in a kind, as of experts, are `*`."""

    kind: str
    layers: int
    bits_per_weight: float
    weight_error: Annotated[float, Field(description="Arithmetic mean over layers.")]
    output_error: Annotated[float | None, Field(description="Arithmetic mean over calibrated layers.")]


class KeptReport(FilePart):
    """A module left as it was."""

    name: str
    reason: str


class TableReport(FilePart):
    """An embedding, output head or patch embedding stored as 8-bit rows."""

    modules: Annotated[list[str], Field(description="Modules that share it; it is stored under the first.")]
    rows: int
    columns: int
    bits_per_weight: float
    weight_error: Annotated[float, Field(description="‖W - Ŵ‖² / ‖W‖².")]


class TimeReport(FilePart):
    """Where the time went."""

    total: float
    calibration: Annotated[float, Field(description="Reading the data, or letting the model write it.")] = 0.0
    allocate: Annotated[float, Field(description="Measuring how much each layer matters, and choosing its bits.")] = 0.0
    trace: Annotated[float, Field(description="Embedding the samples and recording block arguments.")]
    forward: Annotated[float, Field(description="Running blocks, Hessians included.")]
    solve: float
    reconstruct: Annotated[float, Field(description="Tuning blocks by gradient.")] = 0.0
    distill: Annotated[float, Field(description="Tuning the whole model by gradient.")] = 0.0
    check: Annotated[float, Field(description="Predicting a sample from what was written.")] = 0.0
    read_and_write: float


class MachineReport(FilePart):
    """What it ran on."""

    device: str
    dtype: Annotated[str | None, Field(description="What was computed in.")] = None
    processes: Annotated[int, Field(description="That shared the run.")] = 1
    threads: Annotated[int, Field(description="Of each process.")]
    peak_memory_bytes: Annotated[int, Field(description="Peak resident memory of the process that wrote.")]
    expected_memory_bytes: Annotated[int, Field(description="What the plan had said.")]
    versions: Annotated[dict[str, str], Field(description="shiftadd-cli, python, torch, transformers, safetensors.")]


class Report(FilePart):
    """report.json; the writer adds `files`: {file name: {bytes, sha256}}."""

    schema_version: int = SCHEMA_VERSION
    command: Annotated[list[str], Field(description="Arguments of the run that wrote it.")]
    source: SourceReport
    recipe: Annotated[dict[str, object], Field(description="The recipe with all defaults resolved.")]
    recipe_fingerprint: str
    calibration: Annotated[CalibrationReport | None, Field(description="null for a run without data.")]
    bit_plan: Annotated[BitPlanReport | None, Field(description="null where all layers have equal bits.")] = None
    size: SizeReport
    kinds: list[KindReport]
    layers: Annotated[
        list[LayerReport],
        Field(
            description="Errors are those before any block reconstruction and distillation. With asymmetric "
            "calibration, W is the weight corrected for the errors of the layers before."
        ),
    ]
    blocks: Annotated[list[BlockReport], Field(description="Empty without block reconstruction.")] = Field(
        default_factory=list
    )
    distillation: Annotated[DistillationReport | None, Field(description="null without.")] = None
    tables: Annotated[
        list[TableReport],
        Field(description="Embeddings, output heads and patch embeddings stored as 8-bit rows."),
    ] = Field(default_factory=list)
    kept: list[KeptReport]
    seconds: TimeReport
    machine: MachineReport

    @property
    def starved(self) -> list[LayerReport]:
        """Layers that calibration did not reach, or hardly."""
        return [] if self.calibration is None else [layer for layer in self.layers if not layer.calibrated]


def average_kinds(layers: list[LayerReport]) -> list[KindReport]:
    """One row per kind, in the order the kinds first appear."""
    kinds: dict[str, list[LayerReport]] = {}
    for layer in layers:
        kinds.setdefault(alike(layer.kind), []).append(layer)
    rows = []
    for kind, members in kinds.items():
        weights = [each.out_features * each.in_features for each in members]
        bits = sum(each.bits_per_weight * count for each, count in zip(members, weights, strict=True)) / sum(weights)
        outputs = [each.output_error for each in members if each.output_error is not None]
        rows.append(
            KindReport(
                kind=kind,
                layers=len(members),
                bits_per_weight=bits,
                weight_error=sum(each.weight_error for each in members) / len(members),
                output_error=sum(outputs) / len(outputs) if outputs else None,
            )
        )
    return rows
