"""What a user may be shown: one sentence that names the fault and the cure.

Every error a user can cause derives from `ShiftaddError`; the command line prints its text on one line and leaves
with `exit_code`. Anything else that escapes is a defect of ours and keeps its traceback.

Messages name options as fields in backticks, `seq_len` or `dtype=float32`, as Python takes them. The command line puts
its flags there.
"""

from __future__ import annotations

from typing import NamedTuple

from pydantic import ValidationError


def first_line(error: BaseException) -> str:
    """What an error of another library says, short enough for a sentence of ours: its first line, or else its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


class ShiftaddError(Exception):
    """Base of all errors shown to users verbatim."""

    exit_code = 2


class SourceError(ShiftaddError):
    """The model to read is missing, broken, or of a kind this tool does not handle."""


class CalibrationError(ShiftaddError):
    """The calibration or evaluation data cannot be used."""


class RecipeError(ShiftaddError):
    """An option, a recipe file or a combination of options is not valid."""


class AllocationError(ShiftaddError):
    """A bit plan cannot be used for this run, or no choice of bits meets what is asked."""


class PromptError(ShiftaddError):
    """The prompt cannot be given to the model."""


class NumericalError(ShiftaddError):
    """A layer holds or produces values that cannot be quantized; the message names the layer."""


class ArtifactError(ShiftaddError):
    """A compressed checkpoint is damaged, of another version, or not one of ours."""


class RuntimeChoiceError(ShiftaddError):
    """The environment asks for kernels that do not exist or cannot run on this machine."""


class CostError(ShiftaddError):
    """A file of unit costs cannot be used."""


class ExportError(ShiftaddError):
    """The checkpoint cannot be written in the format asked for."""


class HubError(ShiftaddError):
    """The hub cannot be reached, or does not take what is uploaded."""


class OutputError(ShiftaddError):
    """The result cannot be written where the user asked."""


class MemoryLimitError(ShiftaddError):
    """A run is expected to need more memory than it may take."""


class ResumeError(ShiftaddError):
    """An unfinished run is damaged, or was begun with other options, another model or another text."""


class TeamError(ShiftaddError):
    """Another process of a run of several has stopped, or no longer answers."""

    exit_code = 3


class Interrupted(KeyboardInterrupt):
    """A run was stopped by the user (exit code 130) or asked to end by the system (143); says how to go on."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Fault(NamedTuple):
    """place: keys and indices that lead to the value, from the outside in; message: what is wrong with it."""

    place: tuple[str, ...]
    message: str


def first_fault(failure: ValidationError) -> Fault:
    """The first of what was found."""
    error = failure.errors()[0]
    # pydantic puts this before what validators of ours say.
    return Fault(tuple(map(str, error["loc"])), error["msg"].removeprefix("Value error, "))
