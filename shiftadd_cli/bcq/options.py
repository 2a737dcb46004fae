"""Options of the solver: the format of a matrix, and the search for its codes and scales."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from shiftadd_cli.bcq.choices import Choice
from shiftadd_cli.bcq.matrix_format import MatrixFormat, OptionFields

FitMethod = Literal["search", "greedy", "uniform"]


class FitOptions(OptionFields):
    """How codes and scales are found.

    Shift layers have only row scales, and trellis-coded planes start from the scales of their code: the fields about
    fitting groups do not apply to either, and their sweep is static.
    """

    fit: Annotated[
        FitMethod,
        Field(
            description="How a group is fitted: 'search' runs alternating least squares from several starts; 'greedy' "
            "uses only the greedy start, as in LUT-GEMM and ShiftAddLLM; 'uniform' rounds to the min-max grid."
        ),
    ]
    fit_rounds: Annotated[int, Field(ge=0, description="Rounds of alternating least squares per start.")]
    weight_error: Annotated[
        float,
        Field(
            ge=0,
            description="Weight of the weight error, which is added to the output error, relative to the mean diagonal "
            "of the Hessian.",
        ),
    ]
    sweep: Annotated[
        Literal["none", "static", "dynamic"],
        Field(
            description="Column sweep in which later columns compensate for earlier errors: scales are fixed before it "
            "('static'), or fitted when it reaches a group ('dynamic', as in ShiftAddLLM)."
        ),
    ]
    sweep_order: Annotated[
        Literal["hessian", "natural"],
        Field(description="Order of the sweep: most active input columns first, or left to right."),
    ]
    refine_rounds: Annotated[
        int, Field(ge=0, description="Rounds of joint scale refit and coordinate descent after the sweep.")
    ]
    descent_passes: Annotated[
        int, Field(ge=1, description="Passes of coordinate descent over the columns in each of these rounds.")
    ]
    asymmetric: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="How far each linear layer targets its output in the original model, where inputs are exact, "
            "instead of its own weights: 0 not at all, 1 fully (as in GPTAQ).",
        ),
    ]
    drift: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="How far a linear layer that adds its output to the hidden states also corrects what these "
            "lost in earlier layers: 0 not at all, 1 as far as its inputs tell. For these layers it replaces "
            "`asymmetric`.",
        ),
    ]
    seed: Annotated[int, Field(ge=0, lt=2**63, description="Seed of all random numbers.")]


class SolverOptions(FitOptions):
    """All options of the solver for matrices of one format.

    Raises pydantic's ValidationError, a ValueError, if rows that share scales are to be refined or scaled one by one.
    """

    format: MatrixFormat

    @model_validator(mode="after")
    def _shared_scales_stay_shared(self) -> SolverOptions:
        if self.format.group_rows != 1 and (self.refine_rounds or self.format.row_scale):
            raise ValueError("rows that share scales cannot be refined or scaled one by one")
        return self

    def at(self, choice: Choice) -> SolverOptions:
        """The same options for matrices stored as `choice`."""
        return self.replaced(format=self.format.at(choice))

    def without_data(self) -> SolverOptions:
        """The same format and fit, for a layer that received no calibration input."""
        return self.replaced(sweep="none", refine_rounds=0)
