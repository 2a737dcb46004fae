"""The jinja2 environment for the templates of pages and cards."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from shiftadd_cli.sizes import size


def make_environment(*, html: bool) -> Environment:
    """An environment for this package's templates, with the filters they share. In HTML templates all values are
    escaped, regardless of the template's file name."""
    environment = Environment(
        loader=PackageLoader("shiftadd_cli.report"),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # A card ends like its template; a page is assembled from several templates.
        keep_trailing_newline=not html,
    )
    environment.filters |= {
        "size": size,
        "number": lambda value, digits: "-" if value is None else f"{value:.{digits}f}",
    }
    return environment
