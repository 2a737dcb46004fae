"""Solutions of a linear for every candidate form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from shiftadd_cli.bcq.choices import Choice
from shiftadd_cli.bcq.options import SolverOptions
from shiftadd_cli.bcq.solver import Solution, quantize_matrices
from shiftadd_cli.distributed.team import ALONE, Team


class CandidateSolver:
    """The solver of the run, without its refinement rounds (these lower all errors by similar factors and take most of
    its time) and without asymmetric calibration or drift (no layer before the linear is quantized here)."""

    def __init__(self, options: SolverOptions, candidates: Sequence[Choice], team: Team = ALONE) -> None:
        """options: those of the run; their choice is ignored. team: its processes share the rows."""
        self._options = options.replaced(refine_rounds=0, asymmetric=0.0, drift=0.0)
        self._candidates, self._team = candidates, team

    def __call__(
        self, names: Sequence[str], weights: Sequence[Tensor], hessian: Tensor | None
    ) -> Iterator[tuple[Choice, list[Solution]]]:
        """Solutions, by candidate, of linears that read one input: weights `[out, in]`, second moment `[in, in]`, None
        if no calibration input reached them."""
        options = self._options if hessian is not None else self._options.without_data()
        for choice in self._candidates:
            yield choice, quantize_matrices(weights, names, hessian, options.at(choice), team=self._team)


def relative_error(solution: Solution) -> float:
    """‖(W − Ŵ) x‖² / ‖W x‖² over the calibration inputs, or ‖W − Ŵ‖² / ‖W‖² if there were none."""
    return solution.weight_error if solution.output_error is None else solution.output_error
