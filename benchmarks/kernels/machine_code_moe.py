# SPDX-License-Identifier: Apache-2.0
"""What Triton makes of the kernels of a mixture of experts; see `machine_code.py`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.kernels.machine_code import MachineCode, Variant, compile_kernel
from vllm_nanoquant.kernels import moe_decode, moe_grouped, moe_plan
from vllm_nanoquant.kernels.fragments import FOUR_WIDE
from vllm_nanoquant.kernels.layout import CHUNK, TILE
from vllm_nanoquant.kernels.moe_grouped import GroupedSettings


def _decode_constants(top_k: int, one_token: bool) -> dict[str, Any]:
    return {
        "TOP_K": top_k,
        "HAS_MAP": False,
        "ONE_TOKEN": one_token,
        "map_ptr": None,
        "TILES": moe_decode.TILES_OF_ONE_TOKEN if one_token else moe_decode.TILES,
        "W": moe_decode.WARPS,
        "PREFETCH": moe_decode.PREFETCH,
    }


def compile_up(variant: Variant, top_k: int = 6, one_token: bool = True) -> MachineCode:
    """The first product of few tokens; the variant's group offset is for the second."""
    constants = _decode_constants(top_k, one_token) | {"SQUARED_RELU": True}
    return _decode(moe_decode.up_kernel, replace(variant, group_offset=0), constants)


def compile_down(variant: Variant, top_k: int = 6, one_token: bool = True) -> MachineCode:
    """The second product of few tokens."""
    return _decode(moe_decode.down_kernel, variant, _decode_constants(top_k, one_token))


def _decode(kernel: Any, variant: Variant, constants: dict[str, Any]) -> MachineCode:
    warps = constants["W"]
    code = compile_kernel(kernel, variant, constants, {"num_warps": warps, "num_stages": 1})
    return replace(code, weights=warps * constants["TILES"] * TILE * CHUNK)


def compile_grouped(
    settings: GroupedSettings, variant: Variant, top_k: int = 6, experts: int = 128
) -> MachineCode:
    """The first product of many tokens."""
    hopper = variant.architecture == 90
    constants = {
        "SHARED_BY": top_k,
        "EXPERTS": experts,
        "SQUARED_RELU": True,
        "HAS_WEIGHTS": False,
        "weights_ptr": None,
        "ROWS": settings.rows,
        "TOKENS": settings.tokens,
        "HALVES": settings.halves,
        "WIDE": FOUR_WIDE.value and not hopper,
        "HOPPER": hopper,
    }
    options = {"num_warps": settings.warps, "num_stages": settings.stages}
    code = compile_kernel(moe_grouped.grouped_kernel, variant, constants, options)
    return replace(code, weights=settings.rows * CHUNK)


def compile_plan(variant: Variant, pairs: int) -> MachineCode:
    """The kernel that plans the work of few tokens."""
    constants = {"PAIRS": pairs, "PLANNED": moe_plan.PLANNED, "HAS_MAP": False, "map_ptr": None}
    options = {"num_warps": 4, "num_stages": 1}
    return compile_kernel(moe_plan.plan_kernel, variant, constants, options)
