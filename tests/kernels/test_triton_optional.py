"""Triton is optional: only the modules named after it import it, and others import those only inside functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path


def imported_at_the_top(file: Path) -> Iterator[str]:
    """Full names of the imports outside functions, which run when the module itself is imported."""
    pending: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            pending.extend(ast.iter_child_nodes(node))


def needs_triton(file: Path) -> list[str]:
    """Imports at the top of a module from triton, or from our modules named after it except `triton_weight`."""
    names = []
    for name in imported_at_the_top(file):
        parts = name.split(".")
        if any(part.startswith("triton") for part in parts) and "triton_weight" not in parts:
            names.append(name)
    return names


def test_no_other_module_imports_triton_at_the_top(repository: Path) -> None:
    files = set((repository / "shiftadd_cli").rglob("*.py"))
    kernels = set((repository / "shiftadd_cli/kernels").glob("triton_*.py"))
    # This checks the search itself: all of these modules but `triton_weight` use triton.
    assert {file.name for file in kernels if not needs_triton(file)} == {"triton_weight.py"}
    assert {str(file): needs_triton(file) for file in files - kernels if needs_triton(file)} == {}
