"""The schema of report.json, version 1. Sizes are in bytes, times in seconds, errors are relative squared errors."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from shiftadd_cli.artifact.contents import alike
from shiftadd_cli.bcq.choices import Choice, Primitive, choice_of, table_words
from shiftadd_cli.storage.file_part import FilePart

SCHEMA_VERSION = 1


class LeftBehindReport(FilePart):
    """Tensors in the original's files that its model does not read, and that the checkpoint therefore lacks."""

    part: Annotated[str, Field(description="Their name in the model, or the prefix of their names.")]
    tensors: Annotated[int, Field(description="Number of tensors.")]
    nbytes: Annotated[int, Field(description="Their size in the original's files.")]
    reason: str


class SourceReport(FilePart):
    """The model that was compressed."""

    spec: Annotated[str, Field(description="The model as named on the command line.")]
    name: str
    architecture: Annotated[str, Field(description="transformers class of the model.")]
    fingerprint: Annotated[str, Field(description="SHA-256 over configuration, weight file headers and samples.")]
    dtype: Annotated[str, Field(description="dtype of everything not quantized.")]
    parameters: Annotated[int, Field(description="Number of parameters; tied ones count once.")]
    file_bytes: Annotated[int, Field(description="Size of the original's weight files.")]
    model_bytes: Annotated[int, Field(description="Size of the original's parameters at `dtype`.")]
    hub_id: Annotated[str | None, Field(description="null unless the model was named by its hub id.")] = None
    license: Annotated[str | None, Field(description="From the original's model card or file.")] = None
    reads_images: Annotated[bool, Field(description="True for a vision model.")] = False
    left_behind: Annotated[list[LeftBehindReport], Field(description="Tensors that the model does not read.")] = Field(
        default_factory=list
    )


class CalibrationPart(FilePart):
    """One text of a mixture."""

    name: str
    fingerprint: Annotated[str, Field(description="SHA-256 of the text, or of the windows that the model wrote.")]
    share: Annotated[float, Field(description="Requested share of the windows.")]
    samples: Annotated[int, Field(description="Number of windows.")]


class CalibrationReport(FilePart):
    """The data the model was run on."""

    name: str
    fingerprint: Annotated[
        str,
        Field(
            description="SHA-256 of the text, of the windows if the model wrote them or they are a mixture, or over "
            "the names of all images and the bytes of some."
        ),
    ]
    samples: Annotated[int, Field(description="Number of token windows, or of images.")]
    seq_len: Annotated[int | None, Field(description="Tokens per window; null for images.")]
    tokens: Annotated[int | None, Field(description="Total number of tokens; null for images.")]
    window_start: Annotated[
        str | None,
        Field(description="Special tokens at the start of every window, included in its tokens; null for images."),
    ] = None
    image_shape: Annotated[
        tuple[int, ...] | None, Field(description="Channels, height and width of an image as the model reads it.")
    ] = None
    parts: Annotated[list[CalibrationPart], Field(description="Texts of a mixture; empty for a single text.")] = Field(
        default_factory=list
    )

    @property
    def amount(self) -> str:
        """The amount of data, in words."""
        if self.seq_len is None:
            return f"{self.samples} images"
        start = f", windows begin with {self.window_start}" if self.window_start else ""
        return f"{self.samples} x {self.seq_len} tokens{start}"


class SizeReport(FilePart):
    """Sizes of the written checkpoint."""

    files_bytes: Annotated[int, Field(description="All weight files, headers included.")]
    quantized_bytes: Annotated[int, Field(description="Planes, scales, row scales and offsets.")]
    table_bytes: Annotated[int, Field(description="Embeddings, heads and patch embeddings, scales included.")] = 0
    kept_bytes: Annotated[int, Field(description="Tensors stored unchanged.")]
    quantized_weights: int
    bits_per_weight: Annotated[float, Field(description="Of the quantized layers, with all their stored tensors.")]
    planes_per_weight: Annotated[float, Field(description="Bits of the quantized layers, averaged over weights.")]
    whole_file_bits_per_weight: Annotated[float, Field(description="Bits of all weight files over all parameters.")]


class TradeOffPoint(FilePart):
    """Stored bits per weight of the quantized layers, and the loss predicted for them."""

    bits_per_weight: float
    predicted_loss: float


class UniformPoint(TradeOffPoint):
    """The same with equal bits for all layers; `bits` is that number."""

    bits: int


class BitPlanReport(FilePart):
    """The plan that assigned the layers their bits."""

    fingerprint: Annotated[str, Field(description="SHA-256 of the plan.")]
    sensitivity: Annotated[str, Field(description="How the sensitivity of the layers was measured.")]
    predicted_loss: Annotated[float, Field(description="Sum over layers, in the unit of the sensitivity.")]
    uniform: Annotated[
        list[UniformPoint],
        Field(description="One point for every number of bits available to all layers."),
    ] = Field(default_factory=list)
    bound: Annotated[
        list[TradeOffPoint],
        Field(
            default_factory=list,
            description="No plan lies below the line through these points: the lower convex hull without tied layers.",
        ),
    ]


class LayerReport(FilePart):
    """One quantized linear layer."""

    name: str
    kind: Annotated[str, Field(description="Path of the layer inside its block.")]
    block: int
    out_features: int
    in_features: int
    primitive: Annotated[Primitive, Field(description="bcq, trellis1, trellis2, shift1 or shift2.")] = "bcq"
    bits: Annotated[int, Field(description="Stored bits of a weight: binary planes, or bits of another code.")]
    bits_per_weight: float
    weight_error: Annotated[float, Field(description="‖W - Ŵ‖² / ‖W‖².")]
    output_error: Annotated[
        float | None,
        Field(
            description="E‖(W - Ŵ)x‖² / E‖Wx‖² over the calibration inputs, both about their means if a bias was "
            "corrected; null without calibration."
        ),
    ]
    calibrated: Annotated[
        bool,
        Field(
            description="False if no calibration input reached the layer, or an expert's were fewer than its inputs."
        ),
    ]
    tokens: Annotated[
        int | None, Field(description="Number of calibration tokens that the layer read; null without calibration.")
    ] = None

    @property
    def choice(self) -> Choice:
        """Primitive and bits as one choice."""
        return choice_of(self.primitive, self.bits)


class BlockReport(FilePart):
    """A block that was reconstructed."""

    name: str
    error_before: Annotated[
        float,
        Field(description="Mean over held-out tokens of ‖y - ŷ‖² / ‖y‖², where y is the original block's output."),
    ]
    error_after: Annotated[float, Field(description="The same after tuning.")]
    kept: Annotated[bool, Field(description="False if tuning made it worse and was undone.")]


class DistillationReport(FilePart):
    """Tuning of the whole model at the end."""

    divergence_before: Annotated[
        float,
        Field(
            description="Mean of KL(original || compressed), in nats, over the predictions for held-out samples; mean "
            "of 1 - cosine of the features for a model without a head."
        ),
    ]
    divergence_after: Annotated[float | None, Field(description="The same after tuning; null if it was not finite.")]
    kept: Annotated[bool, Field(description="False if tuning made it worse and was undone.")]


class KindReport(FilePart):
    """Averages over the layers of one kind; numbers in a kind, such as those of experts, are replaced by `*`."""

    kind: str
    layers: int
    bits_per_weight: float
    weight_error: Annotated[float, Field(description="Arithmetic mean over layers.")]
    output_error: Annotated[float | None, Field(description="Arithmetic mean over calibrated layers.")]


class KeptReport(FilePart):
    """A module that was not quantized."""

    name: str
    reason: str


class TableReport(FilePart):
    """A compressed embedding, head (output head or classifier) or patch embedding."""

    modules: Annotated[list[str], Field(description="Modules that share the matrix; it is stored under the first.")]
    rows: int
    columns: int
    primitive: Annotated[Primitive | None, Field(description="As of a layer; null for 8-bit rows.")] = None
    bits: Annotated[int, Field(description="Stored bits of a weight.")] = 8
    bits_per_weight: float
    weight_error: Annotated[float, Field(description="‖W - Ŵ‖² / ‖W‖².")]
    output_error: Annotated[
        float | None,
        Field(
            description="E‖(W - Ŵ)x‖² / E‖Wx‖² over the inputs of the head or of the patch embedding in the original; "
            "null for 8-bit rows, for an embedding alone, and without calibration."
        ),
    ] = None

    @property
    def form(self) -> str:
        """The form in words, such as `8-bit rows` or `trellis1-4`."""
        return table_words(self.primitive, self.bits)


class TimeReport(FilePart):
    """Time spent in each stage."""

    total: float
    calibration: Annotated[float, Field(description="Reading the data, or generating it with the model.")] = 0.0
    allocate: Annotated[float, Field(description="Measuring sensitivities and choosing bits.")] = 0.0
    trace: Annotated[float, Field(description="Embedding the samples and recording block arguments.")]
    forward: Annotated[float, Field(description="Running blocks, including the Hessians.")]
    solve: float
    reconstruct: Annotated[float, Field(description="Gradient-based tuning of blocks.")] = 0.0
    distill: Annotated[float, Field(description="Gradient-based tuning of the whole model.")] = 0.0
    check: Annotated[float, Field(description="Running a sample through the written checkpoint.")] = 0.0
    read_and_write: float


class MachineReport(FilePart):
    """The machine and its resources."""

    device: str
    dtype: Annotated[str | None, Field(description="dtype of the computation.")] = None
    processes: Annotated[int, Field(description="Number of processes that shared the run.")] = 1
    threads: Annotated[int, Field(description="Threads of each process.")]
    peak_memory_bytes: Annotated[int, Field(description="Peak resident memory of the process that wrote the files.")]
    expected_memory_bytes: Annotated[int, Field(description="Peak memory expected by the plan.")]
    versions: Annotated[dict[str, str], Field(description="shiftadd-cli, python, torch, transformers, safetensors.")]


class Report(FilePart):
    """report.json; the writer adds `files`: {file name: {bytes, sha256}}."""

    schema_version: int = SCHEMA_VERSION
    command: Annotated[list[str], Field(description="Command-line arguments of the run.")]
    source: SourceReport
    recipe: Annotated[dict[str, object], Field(description="The recipe, with all defaults resolved.")]
    recipe_fingerprint: str
    calibration: Annotated[CalibrationReport | None, Field(description="null for a run without data.")]
    bit_plan: Annotated[BitPlanReport | None, Field(description="null where all layers have equal bits.")] = None
    size: SizeReport
    kinds: list[KindReport]
    layers: Annotated[
        list[LayerReport],
        Field(
            description="Errors are measured before any block reconstruction and distillation. With asymmetric "
            "calibration or `drift`, W is the weight corrected for the errors of the preceding layers."
        ),
    ]
    blocks: Annotated[list[BlockReport], Field(description="Empty without block reconstruction.")] = Field(
        default_factory=list
    )
    distillation: Annotated[DistillationReport | None, Field(description="null without distillation.")] = None
    tables: Annotated[
        list[TableReport],
        Field(description="Compressed embeddings, heads and patch embeddings."),
    ] = Field(default_factory=list)
    kept: list[KeptReport]
    seconds: TimeReport
    machine: MachineReport

    @property
    def starved(self) -> list[LayerReport]:
        """Layers that read too few calibration tokens, or none."""
        return [] if self.calibration is None else [layer for layer in self.layers if not layer.calibrated]


def average_kinds(layers: list[LayerReport]) -> list[KindReport]:
    """One row per kind, in the order the kinds first appear."""
    kinds: dict[str, list[LayerReport]] = {}
    for layer in layers:
        kinds.setdefault(alike(layer.kind), []).append(layer)
    rows = []
    for kind, members in kinds.items():
        weights = [layer.out_features * layer.in_features for layer in members]
        bits = sum(layer.bits_per_weight * count for layer, count in zip(members, weights, strict=True)) / sum(weights)
        outputs = [layer.output_error for layer in members if layer.output_error is not None]
        rows.append(
            KindReport(
                kind=kind,
                layers=len(members),
                bits_per_weight=bits,
                weight_error=sum(layer.weight_error for layer in members) / len(members),
                output_error=sum(outputs) / len(outputs) if outputs else None,
            )
        )
    return rows
