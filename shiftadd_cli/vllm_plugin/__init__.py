"""Support for our checkpoints in vLLM: a quantization method that it finds by the entry point `vllm.general_plugins`.

`parts`, `joining`, `fused` and `vocabulary` hold the computation and are independent of vLLM; `config`,
`linear_method` and `table_method` adapt it to vLLM's interface and are the only modules of this package that import it.
"""

from __future__ import annotations


def register() -> None:
    """Make vLLM load checkpoints of quant_method "shiftadd". vLLM calls this in each of its processes; calling it
    again changes nothing. Imports vLLM."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from shiftadd_cli.version import QUANT_METHOD
    from shiftadd_cli.vllm_plugin.config import ShiftaddConfig

    register_quantization_config(QUANT_METHOD)(ShiftaddConfig)
