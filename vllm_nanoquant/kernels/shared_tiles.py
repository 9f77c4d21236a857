# SPDX-License-Identifier: Apache-2.0
"""Triton: tiles of a result that several programs share.

Each writes its part, a sum over some of K, to memory; whoever arrives last adds them up. A part
lies there as the tensor cores leave it in the registers of the lanes, 16 bytes of each lane side by
side, so that it goes and comes back without an exchange between lanes.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def as_held(y: tl.tensor, ROWS: tl.constexpr, TOKENS: tl.constexpr) -> tl.tensor:
    """A tile [ROWS, TOKENS] as [TOKENS / 8, 8 * ROWS], four registers of each lane side by side.

    A warp has 16 rows, a lane two of these and two tokens of every eight.
    """
    # row / 16, row / 8 % 2, row % 8, token / 8, token / 2 % 4, token % 2
    y = tl.reshape(y, (ROWS // 16, 2, 8, TOKENS // 8, 4, 2))
    return tl.reshape(tl.permute(y, (3, 0, 2, 4, 1, 5)), (TOKENS // 8, ROWS * 8))


@triton.jit
def as_tile(held: tl.tensor, ROWS: tl.constexpr, TOKENS: tl.constexpr) -> tl.tensor:
    """What `as_held` was given."""
    y = tl.reshape(held, (TOKENS // 8, ROWS // 16, 8, 4, 2, 2))
    return tl.reshape(tl.permute(y, (1, 4, 2, 0, 3, 5)), (ROWS, TOKENS))


@triton.jit
def part_of(
    partial_ptr: tl.tensor,
    program: tl.tensor,
    begins: int,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
) -> tl.tensor:
    """Addresses [TOKENS / 8, 8 * ROWS] of a program's part of a tile, fp32, `as_held`.

    A program may share two tiles; `begins` says whether it is the one that it begins.
    """
    slot = program.to(tl.int64) * 2 + begins
    inner = tl.arange(0, TOKENS // 8)[:, None] * (ROWS * 8) + tl.arange(0, ROWS * 8)[None, :]
    return partial_ptr + slot * (ROWS * TOKENS) + inner


@triton.jit
def sum_of_parts(
    partial_ptr: tl.tensor,
    first: tl.tensor,
    final: tl.tensor,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
) -> tl.tensor:
    """Sum of the parts that programs first to final have, in the order of K, `as_held`."""
    # A part takes TOKENS / 2 registers: four on their way at once, where there is room for them.
    AT_ONCE: tl.constexpr = 4 if TOKENS <= 128 else 1
    total = tl.load(part_of(partial_ptr, first, True, ROWS, TOKENS), cache_modifier=".cg")
    for some in range(first + 1, final + 1, AT_ONCE):
        for ahead in tl.static_range(AT_ONCE):
            other = some + ahead
            at = part_of(partial_ptr, other, False, ROWS, TOKENS)
            if AT_ONCE == 1:
                # No mask: the largest tile leaves no registers for one.
                total += tl.load(at, cache_modifier=".cg")
            else:
                # Not a scalar: Triton's interpreter refuses one as a mask.
                there = tl.full(at.shape, other, tl.int32) <= final
                total += tl.load(at, mask=there, other=0.0, cache_modifier=".cg")
    return total
