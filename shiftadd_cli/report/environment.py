"""How the templates of pages and cards are read."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from shiftadd_cli.sizes import size


def make_environment(*, html: bool) -> Environment:
    """Templates of this package, with the filters that all of them use; in those of HTML values are shown as text,
    whatever the names of the templates end in."""
    environment = Environment(
        loader=PackageLoader("shiftadd_cli.report"),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # A card ends as its template does; a page is put together of several.
        keep_trailing_newline=not html,
    )
    environment.filters |= {
        "size": size,
        "number": lambda value, digits: "-" if value is None else f"{value:.{digits}f}",
    }
    return environment
