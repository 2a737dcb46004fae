"""What the solver makes of a linear as everything that it may be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from shiftadd_cli.bcq.choices import Choice
from shiftadd_cli.bcq.options import SolverOptions
from shiftadd_cli.bcq.solver import Solution, quantize_matrices
from shiftadd_cli.distributed.team import ALONE, Team


class CandidateSolver:
    """The solver that the run will use, without its refinement rounds (these lower all errors by similar factors and
    take most of its time) and without asymmetric calibration (nothing before a linear is quantized here)."""

    def __init__(self, options: SolverOptions, candidates: Sequence[Choice], team: Team = ALONE) -> None:
        """options: of the run, whose choice does not matter. team: whose processes share the rows out."""
        self._options = options.replaced(refine_rounds=0, asymmetric=0.0)
        self._candidates, self._team = candidates, team

    def __call__(
        self, names: Sequence[str], weights: Sequence[Tensor], hessian: Tensor | None
    ) -> Iterator[tuple[Choice, list[Solution]]]:
        """By candidate, the solutions of linears that read one input: weights `[out, in]`, second moment `[in, in]`,
        None for those that no calibration input reached."""
        options = self._options if hessian is not None else self._options.without_data()
        for choice in self._candidates:
            yield choice, quantize_matrices(weights, names, hessian, options.at(choice), team=self._team)


def relative_error(solution: Solution) -> float:
    """‖(W − Ŵ) x‖² / ‖W x‖² over the calibration inputs, and where there were none ‖W − Ŵ‖² / ‖W‖²."""
    return solution.weight_error if solution.output_error is None else solution.output_error
