"""Errors shown to users: one sentence that names the fault and the cure.

Every error a user can cause derives from `ShiftaddError`; the command line prints its text on one line and exits with
`exit_code`. Any other exception that escapes is a bug of ours and keeps its traceback.

Messages name options by their Python field in backticks, `seq_len` or `dtype=float32`. The command line substitutes its
flags.
"""

from __future__ import annotations

from typing import NamedTuple

from pydantic import ValidationError


def first_line(error: BaseException) -> str:
    """The first line of an error from another library, for use in a sentence of ours; its class name if it is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


class ShiftaddError(Exception):
    """Base of all errors shown to users verbatim."""

    exit_code = 2


class SourceError(ShiftaddError):
    """The source model is missing, broken, or of an unsupported kind."""


class CalibrationError(ShiftaddError):
    """The calibration or evaluation data cannot be used."""


class RecipeError(ShiftaddError):
    """An option, a recipe file or a combination of options is not valid."""


class AllocationError(ShiftaddError):
    """A bit plan cannot be used for this run, or no choice of bits meets the request."""


class PromptError(ShiftaddError):
    """The prompt cannot be given to the model."""


class NumericalError(ShiftaddError):
    """A layer contains or produces values that cannot be quantized; the message names the layer."""


class ArtifactError(ShiftaddError):
    """A compressed checkpoint is damaged, has another version, or is not one of ours."""


class RuntimeChoiceError(ShiftaddError):
    """The environment asks for kernels that do not exist or cannot run on this machine."""


class LinearAttentionError(ShiftaddError):
    """An attention layer cannot be made linear, or is called in a way that its constant state cannot answer."""


class CostError(ShiftaddError):
    """A file of unit costs cannot be used."""


class ExportError(ShiftaddError):
    """The checkpoint cannot be written in the requested format."""


class HubError(ShiftaddError):
    """The hub cannot be reached, or rejects the upload."""


class OutputError(ShiftaddError):
    """The result cannot be written to the requested location."""


class MemoryLimitError(ShiftaddError):
    """A run is expected to need more memory than its limit."""


class ResumeError(ShiftaddError):
    """An unfinished run is damaged, or was started with other options, another model or another text."""


class TeamError(ShiftaddError):
    """Another process of a distributed run has stopped, or no longer responds."""

    exit_code = 3


class Interrupted(KeyboardInterrupt):
    """A run was stopped by the user (exit code 130) or terminated by the system (143); says how to resume."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Fault(NamedTuple):
    """place: keys and indices that lead to the value, outermost first; message: the fault."""

    place: tuple[str, ...]
    message: str


def first_fault(failure: ValidationError) -> Fault:
    """The first fault that pydantic reports."""
    error = failure.errors()[0]
    # pydantic prepends this to the messages of our validators.
    return Fault(tuple(map(str, error["loc"])), error["msg"].removeprefix("Value error, "))
