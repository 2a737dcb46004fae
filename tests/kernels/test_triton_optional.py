"""Triton is optional: only the modules named after it import it, and only functions import those."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path


def imported_at_the_top(file: Path) -> Iterator[str]:
    """Full names of what a module imports when it is imported itself: all but the imports inside functions."""
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
    """What a module imports at the top of triton, or of ours after it but for the tensors of a weight."""
    found = []
    for name in imported_at_the_top(file):
        parts = name.split(".")
        if any(part.startswith("triton") for part in parts) and "triton_weight" not in parts:
            found.append(name)
    return found


def test_nothing_else_imports_triton_at_the_top(repository: Path) -> None:
    files = set((repository / "shiftadd_cli").rglob("*.py"))
    kernels = set((repository / "shiftadd_cli/kernels").glob("triton_*.py"))
    # Else the search itself is broken: but for the tensors of a weight all of these use it.
    assert {file.name for file in kernels if not needs_triton(file)} == {"triton_weight.py"}
    assert {str(file): needs_triton(file) for file in files - kernels if needs_triton(file)} == {}
