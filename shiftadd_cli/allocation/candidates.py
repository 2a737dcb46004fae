"""What the solver makes of a linear at every number of bits that it may get."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from shiftadd_cli.bcq.options import SolverOptions
from shiftadd_cli.bcq.solver import Solution, quantize_matrices


class CandidateSolver:
    """The solver that the run will use, without its refinement rounds (these lower all errors by similar factors and
    take most of its time) and without asymmetric calibration (nothing before a linear is quantized here)."""

    def __init__(self, options: SolverOptions, candidates: Sequence[int]) -> None:
        """options: of the run, whose bits do not matter; candidates: numbers of bits."""
        self._options = replace(options, refine_rounds=0, asymmetric=0.0)
        self._candidates = candidates

    def __call__(
        self, names: Sequence[str], weights: Sequence[Tensor], hessian: Tensor | None
    ) -> Iterator[tuple[int, list[Solution]]]:
        """By bits, the solutions of linears that read one input: weights `[out, in]`, second moment `[in, in]`, None
        for those that no calibration input reached."""
        options = self._options if hessian is not None else self._options.without_data()
        for bits in self._candidates:
            yield bits, quantize_matrices(weights, names, hessian, replace(options, bits=bits))


def relative_error(solution: Solution) -> float:
    """‖(W − Ŵ) x‖² / ‖W x‖² over the calibration inputs, and where there were none ‖W − Ŵ‖² / ‖W‖²."""
    return solution.weight_error if solution.output_error is None else solution.output_error
