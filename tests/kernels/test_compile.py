# SPDX-License-Identifier: Apache-2.0
"""Every kernel compiles for the GPUs we name, without spilling, within SM86's shared memory.

No GPU is needed: Triton compiles for any target, and brings the tool that reads the result.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from vllm_nanoquant.kernels import decode, prefill  # noqa: E402

# Ampere (A100, RTX 30), Ada, Hopper, consumer Blackwell.
ARCHITECTURES = (80, 86, 89, 90, 120)
# What one block can have on SM86, the smallest of them.
SHARED_MEMORY_LIMIT = 101376


def resources(cubin: bytes, directory: Path) -> dict[str, int]:
    """Registers, stack and local memory of a kernel: {"REG": ..., "STACK": ..., "LOCAL": ...}."""
    path = directory / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run(
        [tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True
    ).stdout
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def compile_kernel(
    kernel: Any, arguments: dict[str, str], architecture: int, aligned: bool, **options: int
) -> Any:
    """Compile for an architecture; `arguments` are types, or values of constants as "=value".

    `aligned`: pointers and integers are multiples of 16, as with every layer of a real model,
    except those that the kernel does not specialise on.
    """
    constants = {name: eval(kind[1:]) for name, kind in arguments.items() if kind[0] == "="}
    signature = {name: "constexpr" if name in constants else arguments[name] for name in arguments}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(signature)
        if aligned and name not in constants and not kernel.params[index].do_not_specialize
    }
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def wide_loads(compiled: Any) -> bool:
    """Whether some of the kernel's loads take 16 bytes per thread."""
    return re.search(r"ld\.global\S*\.v4\.b32|cp\.async\.cg", compiled.asm["ptx"]) is not None


def check(compiled: Any, directory: Path) -> None:
    assert compiled.metadata.shared <= SHARED_MEMORY_LIMIT
    used = resources(compiled.asm["cubin"], directory)
    assert used["STACK"] == 0 and used["LOCAL"] == 0, f"spills: {used}"


def decode_arguments(
    dtype: str = "bf16",
    group_size: int = 128,
    odd: bool = False,
    bias: bool = False,
    partial: bool = True,
) -> dict[str, str]:
    return {
        "x_ptr": f"*{dtype}",
        "packed_ptr": "*u8",
        "scale_ptr": "*bf16",
        "zero_point_ptr": "*bf16",
        "bias_ptr": f"*{dtype}" if bias else "=None",
        "y_ptr": "*fp32" if partial else f"*{dtype}",
        **dict.fromkeys(("tokens", "n", "k", "groups", "groups_per_split", "group_offset"), "i32"),
        "GROUP_SIZE": f"={group_size}",
        "OFFSET_IS_ODD": f"={odd}",
        "HAS_BIAS": f"={bias}",
        "IS_PARTIAL": f"={partial}",
        "BLOCK_M": f"={decode.BLOCK_M}",
        "BLOCK_N": f"={decode.BLOCK_N}",
    }


def check_decode(directory: Path, architecture: int, aligned: bool = True, **variant: Any) -> None:
    compiled = compile_kernel(
        decode.decode_kernel,
        decode_arguments(**variant),
        architecture,
        aligned,
        num_warps=decode.NUM_WARPS,
        num_stages=decode.NUM_STAGES,
    )
    check(compiled, directory)
    # The tensor cores do the work, and aligned weights arrive 16 bytes at a time.
    assert "mma.sync" in compiled.asm["ptx"]
    if aligned:
        assert wide_loads(compiled)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decode(architecture: int, dtype: str, group_size: int, tmp_path: Path) -> None:
    check_decode(tmp_path, architecture, dtype=dtype, group_size=group_size)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize(("bias", "partial"), [(False, False), (True, False), (False, True)])
def test_decode_variants(
    odd: bool, bias: bool, partial: bool, aligned: bool, tmp_path: Path
) -> None:
    check_decode(tmp_path, 86, aligned, odd=odd, bias=bias, partial=partial)


@pytest.mark.parametrize(
    ("architecture", "dtype", "bias"),
    [(each, "bf16", True) for each in ARCHITECTURES] + [(86, "fp16", True), (86, "bf16", False)],
)
def test_reduce(architecture: int, dtype: str, bias: bool, tmp_path: Path) -> None:
    arguments = {
        "partial_ptr": "*fp32",
        "bias_ptr": f"*{dtype}" if bias else "=None",
        "y_ptr": f"*{dtype}",
        "tokens": "i32",
        "n": "i32",
        "SPLIT": f"={decode.MAX_SPLIT}",
        "HAS_BIAS": f"={bias}",
        "BLOCK_N": f"={decode.REDUCE_BLOCK_N}",
    }
    check(compile_kernel(decode.reduce_kernel, arguments, architecture, True), tmp_path)


@pytest.mark.parametrize(
    ("architecture", "dtype", "group_size", "odd", "aligned"),
    [(each, "bf16", 128, False, True) for each in ARCHITECTURES]
    + [(86, "fp16", 128, False, True), (86, "bf16", 64, False, True), (86, "bf16", 32, False, True)]
    + [(86, "bf16", 128, True, True), (86, "bf16", 128, False, False)],
)
def test_dequantize(
    architecture: int, dtype: str, group_size: int, odd: bool, aligned: bool, tmp_path: Path
) -> None:
    arguments = {
        "packed_ptr": "*u8",
        "scale_ptr": "*bf16",
        "zero_point_ptr": "*bf16",
        "w_ptr": f"*{dtype}",
        **dict.fromkeys(("n", "k", "first_n", "block_columns", "group_offset"), "i32"),
        "GROUP_SIZE": f"={group_size}",
        "OFFSET_IS_ODD": f"={odd}",
        "BLOCK_N": f"={prefill.BLOCK_N}",
    }
    compiled = compile_kernel(
        prefill.dequantize_kernel, arguments, architecture, aligned, num_warps=prefill.NUM_WARPS
    )
    check(compiled, tmp_path)
    if aligned:
        assert wide_loads(compiled)
