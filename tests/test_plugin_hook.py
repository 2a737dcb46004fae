"""The plugin registers itself in any order of imports, so every case runs in an interpreter that has imported neither
this package nor transformers."""

from __future__ import annotations

import subprocess
import sys

REPORT = """
import sys
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
print("shiftadd" in AUTO_QUANTIZER_MAPPING and "shiftadd" in AUTO_QUANTIZATION_CONFIG_MAPPING, flush=True)
"""
# Importing torch takes most of the time, so each case runs in a copy of one interpreter that has done it.
ORDERS = """
import os, sys, torch
for program in sys.argv[1:]:
    if not os.fork():
        exec(program)
        os._exit(0)
    assert os.wait()[1] == 0, program
"""


def run(program: str, *arguments: str) -> str:
    command = [sys.executable, "-c", program, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_plugin_is_registered_in_any_order_of_imports() -> None:
    orders = [
        "import shiftadd_cli; from transformers import AutoModelForCausalLM",
        "import shiftadd_cli; import transformers.quantizers",
        "from transformers import AutoModelForCausalLM; import shiftadd_cli",
        "from shiftadd_cli.runtime import transformers_plugin",
        "import transformers; import shiftadd_cli; transformers.AutoModelForCausalLM",
    ]
    reports = run(ORDERS, *(order + REPORT for order in orders)).split()
    assert dict(zip(orders, reports, strict=True)) == dict.fromkeys(orders, "True")


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
