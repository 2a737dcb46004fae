"""Rooms of the package import only rooms in lower layers of docs/architecture.md, and no imports form a cycle."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "shiftadd_cli"


def modules() -> dict[str, Path]:
    """Files of the package by dotted name, without the package's name; "" is its `__init__`."""
    paths = {}
    for path in (ROOT / PACKAGE).rglob("*.py"):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return paths


MODULES = modules()


def imported(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports anywhere: at the top, inside functions, or only for types."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE]
        for name in names:
            target = name.removeprefix(PACKAGE).removeprefix(".")
            while target not in MODULES:
                target = target.rpartition(".")[0]
            yield target


def documented_layers() -> list[set[str]]:
    """Rooms of every layer, the lowest layer first."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = text.split("<!-- layers -->\n\n```text\n")[1].split("\n```")[0]
    return [set(line.split()) for line in reversed(block.splitlines())]


def room(module: str) -> str:
    return module.split(".")[0] or "__init__"


def test_rooms_import_only_lower_layers() -> None:
    depth = {name: number for number, names in enumerate(documented_layers()) for name in names}
    assert depth.keys() == {room(module) for module in MODULES}
    upwards = [
        f"{module} imports {target}"
        for module, path in MODULES.items()
        for target in imported(path)
        if room(module) != room(target) and depth[room(target)] >= depth[room(module)]
    ]
    assert upwards == []


def test_imports_have_no_cycles() -> None:
    graph: dict[str, set[str]] = defaultdict(set)
    for module, path in MODULES.items():
        # A folder's __init__ runs before its modules, and may name them.
        graph[module] |= {target for target in imported(path) if target not in (module, "")}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)
