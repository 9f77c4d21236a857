# SPDX-License-Identifier: Apache-2.0
"""GPTQ to asymmetric int4: rounding errors are made up for by the columns that are still to come.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(arXiv:2210.17323). With H = X^T X of the layer's inputs, a row's error is (w - w') H (w - w')^T.
Columns are rounded one by one, those with the largest H[k, k] first, and each error is spread over
the columns left. Scales and zero points are fixed before, for groups of neighbouring columns, so
that the order is gone once the integers are there: nothing has to be reordered at run time.
"""

from __future__ import annotations

import torch

from vllm_nanoquant.quantize.groups import (
    WHOLE_ROW,
    QuantizedWeight,
    pack_nibbles,
    unpack_nibbles,
)
from vllm_nanoquant.quantize.mse import quantize_mse
from vllm_nanoquant.quantize.ranges import STEPS, validate_weight

DAMPING = 0.07
"""Share of the Hessian's mean diagonal that is added to it (Red Hat's Nemotron-Nano-9B-v2)."""
BLOCK = 128
"""Columns whose errors are spread together (llm-compressor's default)."""

_STRONGER = 10.0
_MOST_DAMPING = 1.0
# Weights whose errors are weighed at a time: 16 MB in fp32.
_CHUNK_WEIGHTS = 1 << 22


def quantize_gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    group_size: int,
    device: torch.device | None = None,
    damping: float = DAMPING,
    block: int = BLOCK,
) -> QuantizedWeight:
    """Quantize W [N, K] (bf16, fp16 or fp32) on `device`, by default the one it is on.

    Scale and zero point of each group come from `quantize_mse`, weighted by the diagonal of the
    Hessian. A row that plain or weighted `quantize_mse` gives a smaller Hessian-weighted error is
    taken from there. Columns whose inputs were always 0 are rounded to nearest. If the Hessian with
    its damping is not positive definite in fp32, the damping is raised tenfold, up to 1.

    Args:
        weight: W [N, K].
        hessian: X^T X [K, K], fp32 and symmetric; a constant factor does not matter.
        group_size: columns per group, the last one ragged where the size does not divide K.
        device: where to compute, and where the result lies. It holds about 3 K^2 + 5 N K numbers.
        damping: share of the mean of the diagonal that is added to the diagonal, above 0.
        block: columns whose errors are spread together; it changes the speed, not the method.

    Returns:
        The quantized weight. Sums run in the device's order: bytes can differ between devices.

    Raises:
        ValueError: a weight that `quantize_mse` refuses; a Hessian of another shape or dtype, not
            finite, with a negative diagonal, or not positive definite with any damping.
    """
    validate_weight(weight, group_size)
    _validate_settings(damping, block)
    weight = weight.detach()
    device = device or weight.device
    require_hessian(hessian, weight.shape[1])
    hessian = hessian.to(device)
    diagonal = hessian.diagonal().clone()
    plain = quantize_mse(weight, group_size, device)
    weighted = quantize_mse(weight, group_size, device, importance=diagonal)
    dense = weight.to(device, torch.float32)
    if not bool((diagonal > 0).any()):
        return plain
    order = torch.argsort(diagonal, descending=True, stable=True)
    q = spread_errors(
        dense, weighted, order, inverse_factor(hessian, diagonal, order, damping), block
    )
    spread = QuantizedWeight(
        pack_nibbles(q), weighted.scale, weighted.zero_point, group_size, weight.shape[1]
    )
    return _best_rows(dense, hessian, [plain, weighted, spread])


def require_hessian(hessian: torch.Tensor, columns: int) -> None:
    """Raise ValueError unless `hessian` can be the X^T X [K, K] of a weight with K `columns`."""
    if hessian.shape != (columns, columns) or hessian.dtype != torch.float32:
        raise ValueError(
            f"the Hessian is {hessian.dtype} {list(hessian.shape)}; a weight with {columns} "
            f"columns needs torch.float32 [{columns}, {columns}]"
        )
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError(
            "the Hessian is not finite (NaN or infinite): the calibration inputs of this layer "
            "overflow or are broken; check the checkpoint and the text"
        )
    diagonal = hessian.diagonal()
    if bool((diagonal < 0).any()):
        column = int(diagonal.argmin())
        raise ValueError(
            f"the Hessian has {float(diagonal[column]):.3g} on its diagonal at column {column}; a "
            "sum of squares is never negative"
        )


def _validate_settings(damping: float, block: int) -> None:
    if not 0 < damping <= _MOST_DAMPING:
        raise ValueError(f"damping is {damping}; it must be above 0 and at most {_MOST_DAMPING}")
    if block < 1:
        raise ValueError(f"block is {block}; it must be at least 1")


def inverse_factor(
    hessian: torch.Tensor, diagonal: torch.Tensor, order: torch.Tensor, damping: float
) -> torch.Tensor:
    """Upper triangular U [K, K] with U^T U = inverse of the damped Hessian, columns in `order`.

    Row k of U, divided by U[k, k], says how the error of column k is spread. With the Hessian
    turned around, factored (A = L L^T) and turned back, U is the inverse of one triangular matrix:
    neither is the Hessian inverted, nor is a second factorisation needed.
    """
    dead = (diagonal == 0)[order]
    mean = diagonal[diagonal > 0].mean()
    # As if every live input had about unit size: K and the number of tokens must not matter.
    turned = (hessian[order][:, order] / mean).flip(0, 1)
    dead = dead.flip(0)
    turned.masked_fill_(dead[:, None] | dead[None, :], 0.0)
    used = damping
    while True:
        damped = turned.clone()
        damped.diagonal().add_(used)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if not bool(failed) and bool(torch.isfinite(lower).all()):
            break
        if used >= _MOST_DAMPING:
            raise ValueError(
                f"the Hessian is not positive definite, with {used:g} of its mean diagonal added "
                "neither: it is no sum of squares of inputs; use algorithm 'mse' for this layer"
            )
        used = min(used * _STRONGER, _MOST_DAMPING)
    upper = lower.flip(0, 1)
    one = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    return torch.linalg.solve_triangular(upper, one, upper=True)


def spread_errors(
    dense: torch.Tensor,
    grid: QuantizedWeight,
    order: torch.Tensor,
    factor: torch.Tensor,
    block: int,
) -> torch.Tensor:
    """Integers uint8 [N, K] for W [N, K] on the scales and zero points of `grid`."""
    columns = dense.shape[1]
    group = torch.zeros_like(order) if grid.group_size == WHOLE_ROW else order // grid.group_size
    # Transposed: a column of W is contiguous, and so is the block of rows that takes its error.
    left = dense.t()[order]
    q = torch.empty(left.shape, dtype=torch.uint8, device=left.device)
    for first in range(0, columns, block):
        stop = min(first + block, columns)
        scales = grid.scale[group[first:stop]].float()
        zeros = grid.zero_point[group[first:stop]].float()
        errors = torch.empty_like(left[first:stop])
        for k in range(first, stop):
            scale, zero = scales[k - first], zeros[k - first]
            nearest = (left[k] / scale).sub_(zero).round_().clamp_(0.0, STEPS)
            q[k] = nearest
            error = (left[k] - (nearest + zero) * scale) / factor[k, k]
            errors[k - first] = error
            left[k + 1 : stop].addr_(factor[k, k + 1 : stop], error, alpha=-1.0)
        left[stop:].addmm_(factor[first:stop, stop:].t(), errors, alpha=-1.0)
    restored = torch.empty_like(q)
    restored[order] = q
    return restored.t()


def hessian_errors(
    dense: torch.Tensor, hessian: torch.Tensor, weight: QuantizedWeight
) -> torch.Tensor:
    """(w - w') H (w - w')^T of each row, fp32 [N], for W fp32 [N, K] and its quantized form."""
    rows, columns = dense.shape
    width = columns if weight.group_size == WHOLE_ROW else weight.group_size
    group = torch.arange(columns, device=dense.device) // width
    errors = []
    chunk = max(1, _CHUNK_WEIGHTS // columns)
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        lost = unpack_nibbles(weight.packed[:, part], columns).float()
        lost += weight.zero_point[:, part].float().t()[:, group]
        lost *= weight.scale[:, part].float().t()[:, group]
        lost -= dense[part]
        errors.append((lost @ hessian).mul_(lost).sum(dim=1))
    return torch.cat(errors)


def _best_rows(
    dense: torch.Tensor, hessian: torch.Tensor, candidates: list[QuantizedWeight]
) -> QuantizedWeight:
    """Each row from the candidate with the smallest error; of equals, from the last."""
    best = candidates[-1]
    least = hessian_errors(dense, hessian, best)
    packed, scale, zero_point = best.packed, best.scale, best.zero_point
    for other in reversed(candidates[:-1]):
        error = hessian_errors(dense, hessian, other)
        better = error < least
        least = torch.where(better, error, least)
        packed = torch.where(better, other.packed, packed)
        scale = torch.where(better, other.scale, scale)
        zero_point = torch.where(better, other.zero_point, zero_point)
    return QuantizedWeight(packed, scale, zero_point, best.group_size, best.in_features)
