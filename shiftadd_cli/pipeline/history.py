"""A run's journal: its inputs, its finished steps, and whether another run may resume it.

Records: `run` (the inputs), `bits` (a bit plan chosen during the run), `start` (everything before the blocks),
`block-00000`, ... one for each finished block, and `distilled` (the result of tuning the whole model). The hidden
states that the next block needs are stored next to the journal, because recomputed states are not identical to the last
bit. A resumed run may use another device, but every other field of its recipe must be the same. This includes the batch
size, since sums over tokens round by batch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, TypeVar

from pydantic import ConfigDict, Field, JsonValue, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shiftadd_cli.allocation.plan_file import BitPlan
from shiftadd_cli.artifact.workspace import Workspace
from shiftadd_cli.artifact.writer import ArtifactWriter, sha256
from shiftadd_cli.blockwise.stored_states import StoredStates
from shiftadd_cli.code_fingerprint import code_fingerprint
from shiftadd_cli.errors import ResumeError, first_fault
from shiftadd_cli.pipeline.account import PhaseClock, Spent, versions
from shiftadd_cli.pipeline.calibration import samples_fingerprint
from shiftadd_cli.pipeline.plan import Plan
from shiftadd_cli.recipe_file import word
from shiftadd_cli.report.schema import BlockReport, DistillationReport, LayerReport, TableReport
from shiftadd_cli.signals import uninterrupted
from shiftadd_cli.storage.durable import sync
from shiftadd_cli.storage.file_part import FilePart
from shiftadd_cli.storage.record_file import damaged
from shiftadd_cli.storage.refusals import refusals
from shiftadd_cli.verbosity import tell

# Fields of a recipe that may change when a run is resumed.
MAY_CHANGE = ("device",)

_TOKEN_WEIGHTS = "token_weights.safetensors"
_DISTILLED = "distilled.safetensors"

Checksum = Annotated[int, Field(ge=0, lt=2**32)]


class _Part(FilePart):
    model_config = ConfigDict(strict=True)


class RunInputs(_Part):
    """The inputs that determine the bytes of an artifact. `versions` are those of shiftadd, Python and the libraries;
    `code` is the SHA-256 of shiftadd's own modules, `tokens` of the calibration windows, `bit_plan` of the plan that
    the recipe names; `computed` is the compute dtype."""

    recipe: dict[str, JsonValue]
    source: str
    tokens: str | None
    bit_plan: str | None
    computed: str
    versions: dict[str, str]
    code: str

    @classmethod
    def of(cls, plan: Plan, windows: Tensor | None) -> RunInputs:
        return cls(
            recipe=plan.recipe.model_dump(mode="json"),
            source=plan.source.fingerprint,
            tokens=None if windows is None else samples_fingerprint(windows),
            bit_plan=None if plan.bit_plan is None else plan.bit_plan.fingerprint(),
            computed=str(plan.running.dtype),
            versions=versions(),
            code=code_fingerprint(),
        )

    def other_field(self, other: RunInputs) -> str | None:
        """The first recipe field that differs in `other` but must not."""
        differing = (name for name, value in other.recipe.items() if self.recipe.get(name) != value)
        return next((name for name in differing if name not in MAY_CHANGE), None)

    def difference(self, other: RunInputs) -> str | None:
        """The first difference from `other` outside the recipe, in words."""
        if self.source != other.source:
            return "another model, or the model's files have changed"
        if self.tokens != other.tokens:
            return "another calibration text, or its file has changed"
        if self.bit_plan != other.bit_plan:
            return "another bit plan, or its file has changed"
        if self.computed != other.computed:
            return f"another compute dtype ({self.computed}, now {other.computed}: another processor or device)"
        for name in sorted(self.versions.keys() | other.versions.keys()):
            if self.versions.get(name) != other.versions.get(name):
                return f"another version of {name} ({self.versions.get(name)}, now {other.versions.get(name)})"
        return None if self.code == other.code else "another version of shiftadd's own code"


class StatesRecord(_Part):
    """A file of hidden states, and the CRC-32 of each batch in it."""

    file: Annotated[str, Field(pattern=r"^(quantized|original)-\d{5,}\.safetensors$")]
    sums: list[Checksum]


class Step(_Part):
    """The record of a finished step: tensors of the artifact, CRC-32 by name; hidden states by name; the time."""

    written: dict[str, Checksum]
    states: dict[str, StatesRecord]
    spent: Spent


class Start(Step):
    """The step before the blocks; `token_weights` is the SHA-256 of their file, if there is one."""

    token_weights: str | None
    tables: list[TableReport]


class Block(Step):
    """A finished block; `blocks` has its own report, if it was reconstructed."""

    name: str
    layers: list[LayerReport]
    blocks: list[BlockReport]


class Distilled(_Part):
    """The result of distillation; `tensors` is the SHA-256 of the file of tensors that replace those of the blocks."""

    tensors: str
    report: DistillationReport
    spent: Spent


class Bits(_Part):
    """A bit plan that was chosen, as the text of plan.json."""

    plan: str
    spent: Spent


class History:
    """The journal of `workspace`, which must be entered, for a run over the blocks `names`.

    Raises ResumeError if records are damaged or missing.
    """

    def __init__(self, workspace: Workspace, names: tuple[str, ...]) -> None:
        self.workspace, self.names = workspace, names
        self._read_records()

    def _read_records(self) -> None:
        workspace = self.workspace
        self.inputs = self._read("run", RunInputs)
        self.bits = self._read("bits", Bits)
        self.start = self._read("start", Start)
        names = workspace.journal.starting("block-")
        self.blocks = [block for name in names if (block := self._read(name, Block)) is not None]
        self.distilled = self._read("distilled", Distilled)

    def begin(self, inputs: RunInputs) -> None:
        """Record the inputs; raises ResumeError if the unfinished run has other inputs.

        A failed run is never a reason to refuse: it starts over with the new inputs, and a line says so.
        """
        if self.spent is not None and self.inputs is None:
            raise damaged(self.workspace.journal.folder, "the record of its inputs is missing")
        if self.spent is not None and self.inputs is not None and (refusal := self._refusal(self.inputs, inputs)):
            if self.workspace.failure is None:
                raise ResumeError(refusal)
            tell(f"The previous run had other options and failed ({self.workspace.failure}): starting over.")
            self.workspace.start_anew()
            self._read_records()
        if self.spent is None:
            self.workspace.journal.put("run", inputs.model_dump(mode="json"))
            self.inputs = inputs
            return
        names = [block.name for block in self.blocks]
        if names != list(self.names[: len(names)]) or (names and self.start is None):
            raise damaged(self.workspace.journal.folder, "steps are missing")

    def _refusal(self, before: RunInputs, now: RunInputs) -> str | None:
        """Why the run cannot be resumed with the inputs `now`; None if it can."""
        start = f"The unfinished run of {self.workspace.out} was started with"
        if (field := before.other_field(now)) is not None:
            old, new = (word(inputs.recipe.get(field)) for inputs in (before, now))
            return (
                f"{start} {field} = {old}, and this one has {new}; give {old} again to resume, or start over with "
                "`resume=False`."
            )
        difference = before.difference(now)
        return None if difference is None else f"{start} {difference}; start over with `resume=False`."

    @property
    def done(self) -> int:
        """Number of finished blocks."""
        return len(self.blocks)

    @property
    def last(self) -> Step | None:
        """The last finished step among the start and the blocks."""
        return self.blocks[-1] if self.blocks else self.start

    @property
    def spent(self) -> Spent | None:
        """Resources of the finished steps, without idle time and lost work."""
        last = self.distilled or self.last or self.bits
        return None if last is None else last.spent

    @property
    def written(self) -> dict[str, int] | None:
        """Tensors in the artifact, CRC-32 by name; None if it has not been started. Excludes the tensors of
        distillation, which a stopped run may or may not have overwritten."""
        if self.start is None:
            return None
        changed = self.distilled_tensors() or {}
        steps = (self.start, *self.blocks)
        return {name: checksum for step in steps for name, checksum in step.written.items() if name not in changed}

    @property
    def bit_plan(self) -> BitPlan | None:
        """The bit plan that was chosen during the run."""
        if self.bits is None:
            return None
        try:
            return BitPlan.model_validate_json(self.bits.plan)
        except ValidationError as failure:
            raise damaged(self.workspace.journal.folder / "bits.json", "it is not a bit plan") from failure

    def keep_bits(self, plan: BitPlan, clock: PhaseClock) -> None:
        """Record the chosen bit plan."""
        with uninterrupted():
            record = Bits(plan=plan.to_json(), spent=clock.spent())
            self.workspace.journal.put("bits", record.model_dump(mode="json"))
            self.bits = record

    def keep_start(
        self,
        writer: ArtifactWriter,
        states: Mapping[str, StoredStates],
        tables: list[TableReport],
        token_weights: Mapping[str, Tensor] | None,
        clock: PhaseClock,
    ) -> None:
        """Record everything before the blocks."""
        with uninterrupted():
            record = Start(
                written=writer.sync(),
                states=_synced(states),
                tables=tables,
                token_weights=None if token_weights is None else self._save(_TOKEN_WEIGHTS, token_weights),
                spent=clock.spent(),
            )
            self.workspace.journal.put("start", record.model_dump(mode="json"))
            self.start = record

    def keep_block(
        self,
        name: str,
        layers: list[LayerReport],
        blocks: list[BlockReport],
        writer: ArtifactWriter,
        states: Mapping[str, StoredStates],
        clock: PhaseClock,
    ) -> None:
        """Record a finished block with the inputs of the next block, and drop its own inputs."""
        with uninterrupted():
            record = Block(
                name=name,
                layers=layers,
                blocks=blocks,
                written=writer.sync(),
                states=_synced(states),
                spent=clock.spent(),
            )
            self.workspace.journal.put(_block_name(self.done), record.model_dump(mode="json"))
            self.blocks.append(record)
            self.drop_old_states()

    def keep_distilled(self, report: DistillationReport, tensors: Mapping[str, Tensor], clock: PhaseClock) -> None:
        """Record the result of tuning the whole model, before any of it overwrites tensors of the blocks."""
        with uninterrupted():
            record = Distilled(tensors=self._save(_DISTILLED, tensors), report=report, spent=clock.spent())
            self.workspace.journal.put("distilled", record.model_dump(mode="json"))
            self.distilled = record

    def distilled_tensors(self) -> dict[str, Tensor] | None:
        """The tensors of `keep_distilled` by name. Raises ResumeError if they are damaged."""
        return None if self.distilled is None else self._load(_DISTILLED, self.distilled.tensors)

    def drop_old_states(self) -> None:
        """Remove hidden states that no later block needs."""
        if self.last is None or not self.workspace.states.is_dir():
            return
        needed = {record.file for record in self.last.states.values()} | {_TOKEN_WEIGHTS, _DISTILLED}
        with refusals(self.workspace.states):
            for path in self.workspace.states.iterdir():
                if path.name not in needed:
                    path.unlink()

    def states(self, samples: int, batch_size: int) -> dict[str, StoredStates]:
        """The input hidden states of the next block, by name. Raises ResumeError if they are damaged."""
        if self.last is None:
            return {}
        return {
            name: StoredStates.reopen(
                self.workspace.states, samples, batch_size, name, self.done, record.file, record.sums
            )
            for name, record in self.last.states.items()
        }

    def token_weights(self) -> dict[str, Tensor] | None:
        """Token weights by name of the linear, if there are any. Raises ResumeError if they are damaged."""
        if self.start is None or self.start.token_weights is None:
            return None
        return self._load(_TOKEN_WEIGHTS, self.start.token_weights)

    def _load(self, name: str, expected: str) -> dict[str, Tensor]:
        path = self.workspace.states / name
        try:
            if sha256(path) != expected:
                raise damaged(path, "it does not match its checksum")
            return load_file(path)
        except (OSError, SafetensorError) as failure:
            raise damaged(path, str(failure)) from failure

    def _save(self, name: str, tensors: Mapping[str, Tensor]) -> str:
        """Write tensors to a file next to the hidden states; returns its SHA-256."""
        path = self.workspace.states / name
        with refusals(path):
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)
            sync(path)
            sync(path.parent)
        return sha256(path)

    def how_to_go_on(self) -> str:
        """How much of a run that stops here is kept, and how to resume it."""
        if self.last is None and self.bits is None:
            return "Nothing was finished yet."
        if self.distilled is not None:
            return "All blocks are finished, and the model is tuned; the same command continues from there."
        return f"{self.done} of {len(self.names)} blocks are finished and kept; the same command continues from there."

    def _read(self, name: str, kind: type[_Kind]) -> _Kind | None:
        record = self.workspace.journal.get(name)
        if record is None:
            return None
        try:
            return kind.model_validate_json(json.dumps(record))
        except ValidationError as failure:
            location, message = first_fault(failure)
            raise damaged(
                self.workspace.journal.folder / f"{name}.json", f"{' '.join(location)}: {message}"
            ) from failure


_Kind = TypeVar("_Kind", bound=_Part)


def _synced(states: Mapping[str, StoredStates]) -> dict[str, StatesRecord]:
    records = {}
    for name, stored in states.items():
        file, sums = stored.sync()
        records[name] = StatesRecord(file=file, sums=sums)
    return records


def _block_name(depth: int) -> str:
    return f"block-{depth:05}"
