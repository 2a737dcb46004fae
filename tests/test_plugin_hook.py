"""The plugin registers itself in any order of imports, so every case runs in its own interpreter."""

from __future__ import annotations

import subprocess
import sys

import pytest

REPORT = """
import sys
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
print("shiftadd" in AUTO_QUANTIZER_MAPPING and "shiftadd" in AUTO_QUANTIZATION_CONFIG_MAPPING)
"""


def run(program: str) -> str:
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize(
    "imports",
    [
        "import shiftadd_cli; from transformers import AutoModelForCausalLM",
        "import shiftadd_cli; import transformers.quantizers",
        "from transformers import AutoModelForCausalLM; import shiftadd_cli",
        "from shiftadd_cli.runtime import transformers_plugin",
        "import transformers; import shiftadd_cli; transformers.AutoModelForCausalLM",
    ],
)
def test_plugin_is_registered_in_any_order_of_imports(imports: str) -> None:
    assert run(imports + REPORT) == "True"


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert run("import sys, shiftadd_cli; print({'torch', 'transformers'} & sys.modules.keys())") == "set()"


def test_hook_is_installed_once_and_leaves_other_imports_alone() -> None:
    program = """
import sys, importlib, shiftadd_cli
importlib.reload(shiftadd_cli)
ours = [finder for finder in sys.meta_path if type(finder).__module__ == "shiftadd_cli.plugin_hook"]
assert len(ours) == 1, ours
assert ours[0].find_spec("transformers", None) is None
assert ours[0].find_spec("transformers.quantizersx", None) is None
print("fine")
"""
    assert run(program) == "fine"
