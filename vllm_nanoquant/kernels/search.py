# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of the search for the range with the least squared error; see `quantize.mse`.

A program takes some rows of one group each, holds their weights in registers and tries everything
there: a weight is read once. `quantize.mse` is the reference, bit for bit: the same operations in
the same order, each rounded once (so nothing is fused into a multiply-add), and sums over a group
in the order of its `_fold`, halves upon halves.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_nanoquant.kernels.layout import ceil_div

# Bytes of weights of a program: what a thread loads at once, and its registers have room for.
PROGRAM_BYTES = 2048
NUM_WARPS = 4

STEPS = tl.constexpr(15.0)
# Adding and subtracting it rounds to the nearest integer, ties to even, up to 2^22.
ROUNDER = tl.constexpr(12582912.0)
# `quantize.mse` tries 3 ranges with both ends drawn in, then moves each end 4 times, twice.
SHRINKS = tl.constexpr(3)
MOVES = tl.constexpr(16)
FITS = tl.constexpr(2)


@triton.jit
def fold(terms: tl.tensor, ROWS: tl.constexpr, LEVELS: tl.constexpr) -> tl.tensor:
    """Sums [ROWS] of terms [ROWS, 2^LEVELS]: the second half upon the first, until one is left."""
    for _ in tl.static_range(LEVELS):
        terms = tl.sum(tl.reshape(terms, (ROWS, 2, terms.shape[1] // 2)), axis=1)
    return tl.reshape(terms, (ROWS,))


@triton.jit
def rounded(x: tl.tensor) -> tl.tensor:
    """The value as bf16 has it, in fp32."""
    # By hand, because Triton's interpreter cuts off where it should round.
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def bf16_bits(x: tl.tensor) -> tl.tensor:
    """A value of `rounded` as the bits of a bf16, int16."""
    return (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16)


@triton.jit
def is_finite(x: tl.tensor) -> tl.tensor:
    """Whether x is neither infinite nor NaN."""
    return tl.abs(x) < float("inf")


@triton.jit
def scale_and_zero_point(low: tl.tensor, high: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """As `quantize.ranges.scale_and_zero_point`, but bf16 values in fp32."""
    scale = rounded(tl.div_rn(high - low, tl.full(low.shape, STEPS, tl.float32)))
    empty = scale == 0.0
    scale = tl.where(empty, 1.0, scale)
    zero = tl.where(empty, 0.0, tl.div_rn(low, scale))
    return scale, rounded(zero) + 0.0


@triton.jit
def in_steps(values: tl.tensor, scale: tl.tensor, zero: tl.tensor) -> tl.tensor:
    """Where values [ROWS, G] lie among the integers 0 to 15, fp32; beyond them as well."""
    return tl.div_rn(values, tl.broadcast_to(scale[:, None], values.shape)) - zero[:, None]


@triton.jit
def nearest(wanted: tl.tensor) -> tl.tensor:
    """Nearest integers, 0 to 15, in fp32."""
    return (tl.minimum(tl.maximum(wanted, 0.0), STEPS) + ROUNDER) - ROUNDER


@triton.jit
def integers(values: tl.tensor, scale: tl.tensor, zero: tl.tensor) -> tl.tensor:
    """Nearest integers of values [ROWS, G], in fp32."""
    return nearest(in_steps(values, scale, zero))


@triton.jit
def squared_error(
    values: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    unit: tl.tensor,
    ROWS: tl.constexpr,
    LEVELS: tl.constexpr,
) -> tl.tensor:
    """Squared error of each group [ROWS], in units of the square of the min-max scale `unit`."""
    wanted = in_steps(values, scale, zero)
    off = wanted - nearest(wanted)
    ratio = tl.div_rn(scale, unit)
    return fold(off * off, ROWS, LEVELS) * (ratio * ratio)


@triton.jit
def exact_error(
    values: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    ROWS: tl.constexpr,
    LEVELS: tl.constexpr,
) -> tl.tensor:
    """Squared error of each group, fp64 [ROWS]."""
    off = integers(values, scale, zero).to(tl.float64) + zero.to(tl.float64)[:, None]
    off = off * scale.to(tl.float64)[:, None] - values.to(tl.float64)
    return fold(off * off, ROWS, LEVELS)


@triton.jit
def fitted(
    values: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    ROWS: tl.constexpr,
    LEVELS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Scale and zero point that fit the present integers best: w against q, a line."""
    q = integers(values, scale, zero)
    total = tl.full(scale.shape, 1 << LEVELS, tl.float32)
    sum_w, sum_q = fold(values, ROWS, LEVELS), fold(q, ROWS, LEVELS)
    sum_qw, sum_qq = fold(q * values, ROWS, LEVELS), fold(q * q, ROWS, LEVELS)
    slope = tl.div_rn(total * sum_qw - sum_q * sum_w, total * sum_qq - sum_q * sum_q)
    new_scale = rounded(slope)
    usable = (new_scale > 0.0) & is_finite(new_scale)
    new_scale = tl.where(usable, new_scale, scale)
    new_zero = tl.div_rn(tl.div_rn(sum_w, new_scale) - sum_q, total)
    new_zero = tl.where(usable & is_finite(new_zero), new_zero, zero)
    return new_scale, rounded(new_zero)


@triton.jit
def tried_end(fraction: tl.tensor, moved: tl.tensor, step: tl.tensor) -> tl.tensor:
    """An end of the range that a step tries: drawn in first, moved later."""
    shrink = tl.where(step == 0, 0.93, tl.where(step == 1, 0.85, 0.77))
    move = (step - SHRINKS) % 4
    first = step < SHRINKS + MOVES // 2
    far = tl.where(first, 0.09, 0.05)
    near = tl.where(first, 0.03, 0.02)
    distance = tl.where((move == 0) | (move == 3), far, near)
    distance = tl.where(move < 2, -distance, distance)
    return tl.where(step < SHRINKS, shrink, tl.where(moved, fraction + distance, fraction))


@triton.jit
def better(
    values: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    error: tl.tensor,
    new_scale: tl.tensor,
    new_zero: tl.tensor,
    unit: tl.tensor,
    ROWS: tl.constexpr,
    LEVELS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The better of two pairs of scale and zero point, its error, and whether it is the new one."""
    new_zero = tl.minimum(tl.maximum(new_zero, -STEPS), 0.0)
    new_error = squared_error(values, new_scale, new_zero, unit, ROWS, LEVELS)
    taken = new_error < error
    scale, zero = tl.where(taken, new_scale, scale), tl.where(taken, new_zero, zero)
    return scale, zero, tl.where(taken, new_error, error), taken


@triton.jit(do_not_specialize=["packed_ptr", "scale_ptr", "zero_ptr", "rows", "total_rows"])
def search_kernel(
    weight_ptr: tl.tensor,
    packed_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    rows: int,
    row_stride: int,
    total_rows: int,
    ROWS: tl.constexpr,
    LEVELS: tl.constexpr,
) -> None:
    """Write nibbles [columns / 2, N], scales and zero points [groups, N] of `rows` rows.

    The pointers are those of the first row, and of the first group; N is total_rows.
    """
    WIDTH: tl.constexpr = 1 << LEVELS
    group = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    at = row.to(tl.int64)[:, None] * row_stride + group * WIDTH + tl.arange(0, WIDTH)[None, :]
    values = tl.load(weight_ptr + at, mask=exists[:, None], other=0.0).to(tl.float32)
    low = tl.minimum(tl.min(values, axis=1), 0.0)
    high = tl.maximum(tl.max(values, axis=1), 0.0)
    unit, first_zero = scale_and_zero_point(low, high)
    # A minimum leaves NaN out; an infinite scale makes the caller look for what is not finite.
    all_finite = tl.min(is_finite(values).to(tl.int32), axis=1) == 1
    unit = tl.where(all_finite, unit, float("inf"))
    scale, zero = unit, first_zero
    error = squared_error(values, scale, zero, unit, ROWS, LEVELS)
    # Two of the 15 steps span the group: few even values come back exactly.
    coarse = low + (high - low) * (STEPS / 2)
    new_scale, new_zero = scale_and_zero_point(low, coarse)
    scale, zero, error, _ = better(
        values, scale, zero, error, new_scale, new_zero, unit, ROWS, LEVELS
    )
    end_low, end_high = tl.full((ROWS,), 1.0, tl.float32), tl.full((ROWS,), 1.0, tl.float32)
    centre_low, centre_high = end_low, end_high
    for step in range(SHRINKS + MOVES):
        begins = (step >= SHRINKS) & ((step - SHRINKS) % 4 == 0)
        centre_low = tl.where(begins, end_low, centre_low)
        centre_high = tl.where(begins, end_high, centre_high)
        upper = (step - SHRINKS) % 8 >= 4
        try_low = tried_end(centre_low, upper == 0, step)
        try_high = tried_end(centre_high, upper, step)
        new_scale, new_zero = scale_and_zero_point(low * try_low, high * try_high)
        scale, zero, error, taken = better(
            values, scale, zero, error, new_scale, new_zero, unit, ROWS, LEVELS
        )
        end_low = tl.where(taken, try_low, end_low)
        end_high = tl.where(taken, try_high, end_high)
    for _ in range(FITS):
        new_scale, new_zero = fitted(values, scale, zero, ROWS, LEVELS)
        scale, zero, error, _taken = better(
            values, scale, zero, error, new_scale, new_zero, unit, ROWS, LEVELS
        )
    kept = exact_error(values, unit, first_zero, ROWS, LEVELS)
    gained = exact_error(values, scale, zero, ROWS, LEVELS) < kept
    scale, zero = tl.where(gained, scale, unit), tl.where(gained, zero, first_zero)
    q = integers(values, scale, zero).to(tl.int32)
    even, odd = tl.split(tl.reshape(q, (ROWS, WIDTH // 2, 2)))
    pair = group * (WIDTH // 2) + tl.arange(0, WIDTH // 2)
    out = pair.to(tl.int64)[None, :] * total_rows + row[:, None]
    tl.store(packed_ptr + out, (even | (odd << 4)).to(tl.uint8), mask=exists[:, None])
    own = group.to(tl.int64) * total_rows + row
    tl.store(scale_ptr + own, bf16_bits(scale), mask=exists)
    tl.store(zero_ptr + own, bf16_bits(zero), mask=exists)


def rows_together(width: int, dtype: torch.dtype) -> int:
    """Rows that a program takes of a weight in groups of `width`."""
    return PROGRAM_BYTES // (width * dtype.itemsize)


def search(
    weight: torch.Tensor,
    width: int,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
) -> None:
    """Quantize rows of whole groups, all on one GPU.

    Args:
        weight: [rows, groups * width] in bf16, fp16 or fp32; the last stride is 1.
        width: columns of a group, one of `quantize.mse.KERNEL_WIDTHS`.
        packed: filled; uint8 [groups * width / 2, rows], a slice of columns of a larger one or not.
        scale: filled; bf16 [groups, rows], likewise.
        zero_point: filled; as `scale`.
    """
    rows, columns = weight.shape
    together = rows_together(width, weight.dtype)
    search_kernel[(ceil_div(rows, together), columns // width)](
        weight,
        packed,
        scale.view(torch.int16),
        zero_point.view(torch.int16),
        rows,
        weight.stride(0),
        packed.stride(0),
        ROWS=together,
        LEVELS=width.bit_length() - 1,
        num_warps=NUM_WARPS,
        num_stages=1,
        enable_fp_fusion=False,
    )
