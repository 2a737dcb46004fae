"""Compiles the kernels for NVIDIA GPUs, which needs no GPU, and prints properties of the binaries as JSON.

Run by test_triton_compile.py in a process of its own, because the tests beside it interpret the kernels. A variant is
named by its kernel, compute capability, primitive, bits, nibbles of a scale, lanes of a word and dtype of the
activations.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shiftadd_cli.bcq.choices import Primitive
from shiftadd_cli.bcq.primitives import PRIMITIVES
from shiftadd_cli.kernels import triton_gemm, triton_gemv, triton_passes
from shiftadd_cli.kernels.triton_weight import register_taps

TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
# Primitive, bits, nibbles of a scale, lanes of a word, offsets.
FORMS: tuple[tuple[Primitive, int, int, int, bool], ...] = (
    ("bcq", 3, 1, 32, False),
    ("bcq", 8, 3, 32, True),
    ("bcq", 4, 0, 8, False),
    ("trellis1", 3, 2, 32, False),
    ("trellis2", 2, 2, 32, False),
)
# All other arguments are integers.
POINTERS = {"row_scale": "*fp32", "bias": "*fp32", "partial": "*fp32"}


def build(
    kernel: Any, capability: int, pointers: dict[str, str], constants: dict[str, Any], warps: int = 4
) -> dict[str, int]:
    """Compile one kernel. Pointers and sizes are assumed to be multiples of 16, as for large matrices."""
    names = kernel.arg_names
    types = dict.fromkeys(names, "i32") | POINTERS | pointers | dict.fromkeys(constants, "constexpr")
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names if types[name] != "constexpr"}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, {name: types[name] for name in names}, values, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    return {
        "barriers": built.asm["ptx"].count("bar.sync"),
        "stack": stack_bytes(built.asm["cubin"]),
        "shared": built.metadata.shared,
        "tensor_cores": len(re.findall(r"\b(?:wgmma\.)?mma[._](?:sync|async)", built.asm["ptx"])),
    }


def stack_bytes(binary: bytes) -> int:
    """Bytes of local memory per thread, which hold the values that did not fit into registers."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return max(int(size) for size in re.findall(r"STACK:(\d+)", usage))


def matrix(name: Primitive, bits: int, nibbles: int, lanes: int, offset: bool) -> tuple[dict[str, str], dict[str, Any]]:
    """Pointers and constants of a matrix with groups of 128 columns."""
    pointers = {
        "codes": "*i32" if lanes == 32 else "*u8",
        "scales": "*u8" if nibbles else "*fp16",
        "offsets": "*fp16",
    }
    planes = PRIMITIVES[name].planes(bits)
    constants: dict[str, Any] = {
        "BITS": bits,
        "PLANES": planes,
        "TAPS": register_taps(bits, planes),
        "NIBBLES": nibbles,
        "GROUP": 128 // lanes,
        "LANES": lanes,
    }
    if not offset:
        constants["offsets"] = None
    return pointers, constants | {"OFFSET": offset}


def main() -> None:
    variants = {}
    for capability in (80, 90):
        for name, bits, nibbles, lanes, offset in FORMS:
            if capability == 90 and bits != 3:
                continue
            pointers, constants = matrix(name, bits, nibbles, lanes, offset)
            kind = f"{capability}-{name}-{bits}-{nibbles}-{lanes}"
            words = triton_gemv._BLOCKS_OF_WORDS[0 if bits == 3 else 1]
            tile = {"BLOCK_PLANES": triton_gemv._BLOCK // words, "BLOCK_WORDS": words}
            types = pointers | {"x": "*fp32"}
            # Triton compiles a separate kernel if an integer is 1, as these are when one token is decoded.
            one = {"rows": 1, "tiles_per_split": 1} if bits == 3 else {}
            variants[f"gemv-{kind}"] = build(triton_gemv._gemv_kernel, capability, types, constants | tile | one)
            for dtype in (torch.float32, torch.float16) if bits == 3 else (torch.bfloat16,):
                rows = triton_gemm._MOST_ROWS[dtype]
                tile = {"BLOCK_OUT": triton_gemm._BLOCK_OUT, "BLOCK_WORDS": triton_gemm._BLOCK_WORDS}
                types, warps = pointers | {"x": TYPES[dtype]}, triton_gemm.warps(rows)
                constants |= tile | {"BLOCK_ROWS": rows}
                variants[f"gemm-{kind}-{str(dtype)[6:]}"] = build(
                    triton_gemm._gemm_kernel, capability, types, constants, warps
                )
        blocks = {"LANES": 32, "JOINED": 4, "BLOCK": 64}
        types = {"x": "*bf16", "spread": "*bf16"}
        variants[f"spread-{capability}"] = build(triton_passes._spread_kernel, capability, types, blocks)
        sums: dict[str, Any] = {"PLANES": 3, "SCALED": True, "BIASED": True, "BLOCK": 256, "splits": 1}
        variants[f"sum-{capability}"] = build(triton_passes._sum_kernel, capability, {"y": "*fp16"}, sums)
    json.dump(variants, sys.stdout)


if __name__ == "__main__":
    main()
