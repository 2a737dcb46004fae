"""Numbers with their standard errors, as text."""

from __future__ import annotations


def with_error(value: float | None, error: float | None, digits: int) -> str:
    """A number and its standard error, if there is one: `41.33 ± 0.61`; a dash for None."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if error is None else f"{value:.{digits}f} ± {error:.{digits}f}"


def share_with_error(value: float | None, error: float | None, digits: int) -> str:
    """A share from 0 to 1 and its standard error, in percent: `67.6 ± 1.5%`; a dash for None."""
    if value is None:
        return "-"
    return with_error(100 * value, None if error is None else 100 * error, digits) + "%"
