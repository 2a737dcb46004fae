from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path


def test_entry_point_for_vllm_is_a_function(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    ((name, value),) = project["entry-points"]["vllm.general_plugins"].items()
    assert callable(EntryPoint(name, value, "vllm.general_plugins").load())


def test_computing_modules_do_not_import_vllm() -> None:
    program = (
        "import sys, shiftadd_cli.vllm_plugin.fused, shiftadd_cli.vllm_plugin.vocabulary\n"
        "print([name for name in sys.modules if name.partition('.')[0] == 'vllm'])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    assert result.stdout.strip() == "[]"
