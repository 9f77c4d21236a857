# SPDX-License-Identifier: Apache-2.0
"""Ways to round a weight, ours and others', each giving the dense weight that a model would see.

Ours are the package's own. The others are written after their definitions, since their tools are
not needed to know what they compute:

    *-int       our scales, with zero points rounded to whole numbers
    rtn-sym     compressed-tensors' int4 symmetric groups: scale = max |w| / 7.5, no zero point
    rtn-asym    the same, asymmetric: scale = (max - min) / 15, whole zero points
    mse-sym     rtn-sym in the range that llm-compressor's mse observer finds
    gptq-sym, gptq-asym, gptq-mse-sym
                GPTQ on those three grids as llm-compressor does it: 0.01 of the mean diagonal is
                added, columns in the order of the diagonal, groups fixed before ("static")
    fp8         e4m3, one scale for each row: simulated, in fp32 arithmetic
    fp8-w8a8    that, with the inputs of each token in e4m3 as well

A group that does not divide K ends in a shorter one, which llm-compressor refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from vllm_nanoquant.kernels.reference import dequantize
from vllm_nanoquant.quantize.algorithms import ALGORITHMS, quantize
from vllm_nanoquant.quantize.gptq import (
    BLOCK,
    inverse_factor,
    quantize_gptq,
    spread_errors,
)
from vllm_nanoquant.quantize.groups import QuantizedWeight, group_count, pack_nibbles
from vllm_nanoquant.quantize.minmax import quantize_minmax
from vllm_nanoquant.quantize.mse import quantize_mse

FLOAT_ZERO, INTEGER_ZERO, NO_ZERO = 16, 4, 0
"""Bits of a group's zero point."""
PEER_DAMPING = 0.01
_SYMMETRIC_ZERO = -8.0
# llm-compressor's mse observer: ranges down to 80 %, in steps of 1 %, error to the power of 2.4.
_SHRINKS = [1 - step / 100 for step in range(20)]
_POWER = 2.4
_E4M3_MAX = 448.0


class Rounded(NamedTuple):
    """A weight after rounding.

    Attributes:
        weight: fp32 [N, K].
        bits: of each weight, scales and zero points included.
    """

    weight: torch.Tensor
    bits: float


def needs_text(method: str) -> bool:
    """Whether a method wants the inputs of calibration."""
    return method.startswith("gptq")


def round_weight(
    weight: torch.Tensor, method: str, group_size: int, hessian: torch.Tensor | None
) -> Rounded:
    """Round W fp32 [N, K] by a method.

    Args:
        weight: W; it holds bf16 values, and our quantizers get it as bf16.
        method: one of ours (minmax, mse, gptq) or of this module's.
        group_size: columns of a group.
        hessian: X^T X fp32 [K, K] for methods that need text.

    Raises:
        ValueError: an unknown method.
    """
    if method.startswith("fp8"):
        return Rounded(to_e4m3(weight), 8 + 16 / weight.shape[1])
    stored = weight.to(torch.bfloat16)
    if method in ALGORITHMS:
        result = quantize(stored, group_size, method, hessian=hessian)
        return Rounded(dequantize(result), _bits(result, FLOAT_ZERO))
    if method == "gptq-int":
        return _gptq_int(stored, group_size, hessian)
    if method in _GRIDS:
        grid, zero_bits = _GRIDS[method]
        result = _nearest(weight, grid(stored, group_size))
        return Rounded(dequantize(result), _bits(result, zero_bits))
    name = method.removeprefix("gptq-")
    known = {"sym": "rtn-sym", "asym": "rtn-asym", "mse-sym": "mse-sym"}
    if name == method or name not in known or hessian is None:
        raise ValueError(f"no such method: {method}, or no calibration for it")
    grid, zero_bits = _GRIDS[known[name]]
    result = gptq_on(weight, hessian, grid(stored, group_size), PEER_DAMPING)
    return Rounded(dequantize(result), _bits(result, zero_bits))


def gptq_on(
    weight: torch.Tensor, hessian: torch.Tensor, grid: QuantizedWeight, damping: float
) -> QuantizedWeight:
    """GPTQ of W fp32 [N, K] on given scales and zero points, without our choice of rows."""
    diagonal = hessian.diagonal().clone()
    order = torch.argsort(diagonal, descending=True, stable=True)
    q = spread_errors(weight, grid, order, inverse_factor(hessian, diagonal, order, damping), BLOCK)
    return QuantizedWeight(
        pack_nibbles(q), grid.scale, grid.zero_point, grid.group_size, grid.in_features
    )


def _gptq_int(weight: torch.Tensor, group_size: int, hessian: torch.Tensor | None) -> Rounded:
    """Our GPTQ with whole zero points: on the grid that it would choose, rounded."""
    if hessian is None:
        raise ValueError("gptq-int needs calibration")
    ours = quantize_gptq(weight, hessian, group_size)
    grid = _with_zero(ours, ours.zero_point.float().round())
    result = gptq_on(weight.float(), hessian, grid, 0.07)
    return Rounded(dequantize(result), _bits(result, INTEGER_ZERO))


def _nearest(weight: torch.Tensor, grid: QuantizedWeight) -> QuantizedWeight:
    """W fp32 [N, K] rounded to the nearest integers of a grid."""
    group = torch.arange(weight.shape[1], device=weight.device) // grid.group_size
    scale = grid.scale.float().t()[:, group]
    zero = grid.zero_point.float().t()[:, group]
    q = (weight / scale - zero).round().clamp(0, 15).to(torch.uint8)
    return QuantizedWeight(
        pack_nibbles(q), grid.scale, grid.zero_point, grid.group_size, grid.in_features
    )


def _with_zero(grid: QuantizedWeight, zero: torch.Tensor) -> QuantizedWeight:
    zero = zero.to(torch.bfloat16)
    return QuantizedWeight(grid.packed, grid.scale, zero, grid.group_size, grid.in_features)


def _minmax_int(weight: torch.Tensor, group_size: int) -> QuantizedWeight:
    grid = quantize_minmax(weight, group_size)
    return _with_zero(grid, grid.zero_point.float().round())


def _mse_int(weight: torch.Tensor, group_size: int) -> QuantizedWeight:
    grid = quantize_mse(weight, group_size)
    return _with_zero(grid, grid.zero_point.float().round())


def _symmetric(weight: torch.Tensor, group_size: int) -> QuantizedWeight:
    return _symmetric_grid(weight, group_size, [1.0])


def _symmetric_mse(weight: torch.Tensor, group_size: int) -> QuantizedWeight:
    return _symmetric_grid(weight, group_size, _SHRINKS)


def _symmetric_grid(weight: torch.Tensor, group_size: int, shrinks: list[float]) -> QuantizedWeight:
    """Symmetric scales of bf16 W [N, K]: of several shrunk ranges, the best of each group."""
    rows, columns = weight.shape
    groups = group_count(columns, group_size)
    padded = torch.zeros((rows, groups * group_size), device=weight.device)
    padded[:, :columns] = weight.float()
    values = padded.view(rows, groups, group_size)
    widest = values.abs().amax(-1)
    best_error = torch.full_like(widest, torch.inf)
    best = torch.ones_like(widest)
    for shrink in shrinks:
        scale = (widest * shrink / 7.5).to(torch.bfloat16).float()
        scale = torch.where(scale == 0, 1.0, scale)
        rounded = (values / scale[..., None]).round().clamp(-8, 7) * scale[..., None]
        error = (rounded - values).abs().pow(_POWER).sum(-1)
        best = torch.where(error < best_error, scale, best)
        best_error = torch.minimum(error, best_error)
    scale = best.t().contiguous().to(torch.bfloat16)
    packed = torch.zeros(((columns + 1) // 2, rows), dtype=torch.uint8, device=weight.device)
    zero = torch.full_like(scale, _SYMMETRIC_ZERO)
    return QuantizedWeight(packed, scale, zero, group_size, columns)


def to_e4m3(values: torch.Tensor) -> torch.Tensor:
    """Values [..., K] rounded to e4m3 with one scale for each row, fp32."""
    scale = values.abs().amax(-1, keepdim=True).float() / _E4M3_MAX
    scale = torch.where(scale == 0, 1.0, scale)
    return (values / scale).to(torch.float8_e4m3fn).float() * scale


def _bits(weight: QuantizedWeight, zero_bits: int) -> float:
    groups = group_count(weight.in_features, weight.group_size)
    return 4 + (16 + zero_bits) * groups / weight.in_features


_Grid = Callable[[torch.Tensor, int], QuantizedWeight]
_GRIDS: dict[str, tuple[_Grid, int]] = {
    "minmax-int": (_minmax_int, INTEGER_ZERO),
    "mse-int": (_mse_int, INTEGER_ZERO),
    "rtn-sym": (_symmetric, NO_ZERO),
    "rtn-asym": (_minmax_int, INTEGER_ZERO),
    "mse-sym": (_symmetric_mse, NO_ZERO),
}
