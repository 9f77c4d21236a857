# SPDX-License-Identifier: Apache-2.0
"""What Triton makes of our kernels: registers, shared memory, instructions per weight.

No GPU is needed: Triton compiles for any NVIDIA architecture, and its package brings the tools that
read the result. `tests/kernels/test_compile.py` sets limits to these figures, and `predict.py`
predicts times from them.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.kernels.disassembly import Instruction, count_kinds, main_loop, parse
from vllm_nanoquant.kernels import decode, fused, prefill, search
from vllm_nanoquant.kernels.layout import CHUNK, TILE, groups_per_chunk
from vllm_nanoquant.kernels.settings import (
    QUARTERS,
    REGISTERS,
    DecodeSettings,
    FusedSettings,
    limit_registers,
)

LANES = 32
RESERVED_SHARED_BYTES = 1024
"""What the driver takes of a multiprocessor's shared memory for each program that runs."""
_POINTERS = {
    "words_ptr": "i32",
    "scales_ptr": "i32",
    "arrivals_ptr": "i32",
    "partial_ptr": "fp32",
    "ids_ptr": "i32",
    "map_ptr": "i32",
    "order_ptr": "i32",
    "starts_ptr": "i32",
    "plan_ptr": "i32",
    "weights_ptr": "fp32",
    "packed_ptr": "u8",
    "scale_ptr": "i16",
    "zero_ptr": "i16",
}


@dataclass(frozen=True)
class MachineCode:
    """A compiled kernel.

    Attributes:
        registers: per thread.
        spilled_bytes: stack and local memory per thread.
        shared_bytes: shared memory per program.
        warps: per program.
        weights: that a program takes in one turn of the main loop; 0: the kernel has none.
        loop: the main loop: the innermost one with tensor core instructions; empty if there is
            none.
        instructions: all of the kernel.
        ptx: the text from which the assembler made it.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    warps: int
    weights: int
    loop: tuple[Instruction, ...]
    instructions: tuple[Instruction, ...]
    ptx: str

    @cached_property
    def counts(self) -> Counter[str]:
        """Instructions of the main loop by kind, loads from global memory with their width."""
        return count_kinds(self.loop)

    @property
    def per_weight(self) -> float:
        """Instructions of the main loop per weight, those of all lanes counted.

        Raises:
            ValueError: the kernel has no main loop.
        """
        if not self.loop or not self.weights:
            raise ValueError("the kernel has no loop with tensor core instructions")
        return len(self.loop) * LANES * self.warps / self.weights

    @property
    def loop_spills(self) -> bool:
        """Whether the main loop reads or writes local memory."""
        return bool(self.counts["LDL"] or self.counts["STL"])

    def programs_at_once(self, shared_bytes: int, warps: int = 48) -> int:
        """Programs that a multiprocessor runs at once, of which it has so much memory and warps.

        Registers are given out to a warp in units of 256, in each quarter to its own warps.
        """
        per_warp = -(-self.registers * LANES // 256) * 256
        return min(
            QUARTERS * (REGISTERS // QUARTERS // per_warp) // self.warps,
            shared_bytes // (self.shared_bytes + RESERVED_SHARED_BYTES),
            warps // self.warps,
        )

    def summary(self) -> str:
        """The figures in one line, for messages."""
        loop = f"{len(self.loop)} instructions in the loop"
        if self.loop and self.weights:
            loop += f", {self.per_weight:.2f} per weight"
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(self.counts.items()))
        return (
            f"{self.registers} registers, {self.spilled_bytes} bytes spilled, {self.shared_bytes} "
            f"bytes of shared memory, {self.warps} warps, {loop} ({kinds})"
        )


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for.

    Attributes:
        architecture: 86 for SM86.
        dtype: of x and y: "bf16" or "fp16".
        group_size: 32, 64 or 128.
        has_bias: whether a bias is added.
        group_offset: columns of the first group that lie before column 0.
        aligned: whether sizes are multiples of 16, as with the layers of real models, and x and
            the bias start at one. What the plugin allocates always does.
        subnormal: whether the tensor cores are taken to keep subnormal bf16 numbers.
    """

    architecture: int
    dtype: str = "bf16"
    group_size: int = 128
    has_bias: bool = False
    group_offset: int = 0
    aligned: bool = True
    subnormal: bool = True


def compile_decode(settings: DecodeSettings, tokens: int, variant: Variant) -> MachineCode:
    """The kernel of 1 to 16 tokens."""
    launch = settings.launch(tokens)
    warps = launch.warps_n * settings.warps_k
    code = compile_kernel(
        decode.decode_kernel,
        variant,
        {
            "M": 8 if tokens <= 8 else 16,
            "TILES": launch.tiles,
            "WARPS_N": launch.warps_n,
            "WARPS_K": settings.warps_k,
            "SPLIT": settings.split,
            "PREFETCH": launch.prefetch,
        },
        {"num_warps": warps, "num_stages": 1, **limit_registers(launch.registers)},
    )
    return replace(code, weights=warps * launch.tiles * TILE * CHUNK)


def compile_fused(settings: FusedSettings, variant: Variant) -> MachineCode:
    """The kernel of some tens to hundreds of tokens."""
    hopper = variant.architecture == 90
    block = f"tensordesc<{variant.dtype}[{settings.tokens},{CHUNK // 2}]>"
    code = compile_kernel(
        fused.fused_kernel,
        variant,
        {
            "ROWS": settings.rows,
            "TOKENS": settings.tokens,
            "PREFETCH": settings.prefetch,
            "WIDE": fused.FOUR_WIDE.value and not hopper,
            "HOPPER": hopper,
        },
        {"num_warps": settings.warps, "num_stages": settings.stages},
        {"arranged": block if hopper else f"*{variant.dtype}"},
    )
    return replace(code, weights=settings.rows * CHUNK)


def compile_arrange(variant: Variant) -> MachineCode:
    """The kernel that copies x for `fused`."""
    wide = fused.FOUR_WIDE.value and variant.architecture != 90
    constants = {"WIDE": wide, "ROWS": fused.ARRANGE_ROWS}
    return compile_kernel(
        fused.arrange_kernel, variant, constants, {"num_warps": 4, "num_stages": 1}
    )


def compile_dequantize(variant: Variant) -> MachineCode:
    """The kernel that writes the weight in bf16 or fp16."""
    constants = {"PER_CHUNK": groups_per_chunk(variant.group_size), "T": prefill.TILES}
    return compile_kernel(
        prefill.dequantize_kernel,
        variant,
        constants,
        {"num_warps": prefill.NUM_WARPS, "num_stages": 1},
    )


def compile_search(variant: Variant) -> MachineCode:
    """The kernel that searches ranges while a model loads."""
    width = variant.group_size
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[variant.dtype]
    constants = {"ROWS": search.rows_together(width, dtype), "LEVELS": width.bit_length() - 1}
    options = {"num_warps": search.NUM_WARPS, "num_stages": 1, "enable_fp_fusion": False}
    return compile_kernel(search.search_kernel, variant, constants, options)


def compile_kernel(
    kernel: Any,
    variant: Variant,
    constants: Mapping[str, Any],
    options: dict[str, Any],
    types: Mapping[str, str] | None = None,
) -> MachineCode:
    """Compile a kernel of ours, or one whose arguments are called as ours are.

    Arguments in lower case that are no pointers are integers of 32 bits, unless `types` names
    another type as Triton does. `constants` holds those in upper case that do not follow from the
    variant, `options` Triton's.
    """
    # As `launch_options` has it: kernels may overlap from SM90 on.
    overlap = variant.architecture >= 90
    common = {
        "PER_CHUNK": groups_per_chunk(variant.group_size),
        "GROUP_OFFSET": variant.group_offset,
        "HAS_BIAS": variant.has_bias,
        "SUBNORMAL": variant.subnormal and variant.dtype == "bf16",
        "PDL": overlap,
    } | ({} if variant.has_bias else {"bias_ptr": None})
    constants = {**constants, **{name: common[name] for name in common if name in kernel.arg_names}}
    if overlap and "PDL" in constants:
        options = options | {"launch_pdl": True}
    known = dict.fromkeys(constants, "constexpr") | dict(types or {})
    signature = {name: known.get(name) or _type(name, variant.dtype) for name in kernel.arg_names}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, parameter in enumerate(kernel.params)
        if variant.aligned
        and not signature[parameter.name].startswith(("constexpr", "tensordesc"))
        and not parameter.do_not_specialize
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", variant.architecture, LANES),
        options=options,
    )
    return _read(compiled, options["num_warps"])


def _type(argument: str, dtype: str) -> str:
    """Triton's name for the type of an argument of our kernels."""
    if argument.isupper():
        raise ValueError(f"the kernel has a constant {argument} that is not given a value here")
    return f"*{_POINTERS.get(argument, dtype)}" if argument.endswith("_ptr") else "i32"


def _read(compiled: Any, warps: int) -> MachineCode:
    """Disassemble a compiled kernel."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = _run_tool("cuobjdump", "--dump-resource-usage", path)
        text = _run_tool("nvdisasm", "-c", path)
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    instructions, labels = parse(text)
    return MachineCode(
        registers=used["REG"],
        spilled_bytes=used["STACK"] + used["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        warps=warps,
        weights=0,
        loop=main_loop(instructions, labels),
        instructions=instructions,
        ptx=compiled.asm["ptx"],
    )


def _run_tool(name: str, *arguments: str | Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout
