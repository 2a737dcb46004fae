"""Rooms of the package import only rooms of lower layers, as docs/architecture.md lists them, and no module itself."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "shiftadd_cli"


def modules() -> dict[str, Path]:
    """Files of the package by dotted name, without the package's own; "" is its `__init__`."""
    found = {}
    for path in (ROOT / PACKAGE).rglob("*.py"):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports anywhere: at the top, inside functions, and for types alone."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE]
        for name in names:
            inner = name.removeprefix(PACKAGE).removeprefix(".")
            while inner not in MODULES:
                inner = inner.rpartition(".")[0]
            yield inner


def documented_layers() -> list[set[str]]:
    """Rooms of every layer, the lowest first."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = text.split("<!-- layers -->\n\n```text\n")[1].split("\n```")[0]
    return [set(line.split()) for line in reversed(block.splitlines())]


def room(module: str) -> str:
    return module.split(".")[0] or "__init__"


def test_every_room_imports_only_those_below() -> None:
    depth = {name: number for number, names in enumerate(documented_layers()) for name in names}
    assert depth.keys() == {room(module) for module in MODULES}
    upwards = [
        f"{module} imports {target}"
        for module, path in MODULES.items()
        for target in imported(path)
        if room(module) != room(target) and depth[room(target)] >= depth[room(module)]
    ]
    assert upwards == []


def test_no_module_imports_itself_through_others() -> None:
    graph: dict[str, set[str]] = defaultdict(set)
    for module, path in MODULES.items():
        # The __init__ of a folder is run before its modules, and may name them.
        graph[module] |= {target for target in imported(path) if target not in (module, "")}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)
