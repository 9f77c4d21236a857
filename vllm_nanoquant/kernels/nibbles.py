# SPDX-License-Identifier: Apache-2.0
"""Triton: the packed integers of one group, read without leaving the tensor."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_group(
    packed_ptr: tl.tensor,
    start: tl.tensor,
    offs_n: tl.tensor,
    in_n: tl.tensor,
    n: int,
    k: int,
    GROUP_SIZE: tl.constexpr,
    OFFSET_IS_ODD: tl.constexpr,
) -> tl.tensor:
    """Load columns start to start + GROUP_SIZE - 1 of W: two uint8 tensors [GROUP_SIZE / 2, N].

    The first holds columns start, start + 2, ..., the second start + 1, start + 3, ...; what lies
    outside the weight (column < 0 or >= k) is 0, and so are rows offs_n where in_n is false.
    packed is uint8 [ceil(K / 2), N].
    """
    k_first = start + 2 * tl.arange(0, GROUP_SIZE // 2)
    first = tl.load(
        packed_ptr + (k_first >> 1).to(tl.int64)[:, None] * n + offs_n[None, :],
        mask=((k_first >= 0) & (k_first < k))[:, None] & in_n[None, :],
        other=0,
        eviction_policy="evict_first",
    )
    # With an even offset both columns of a pair are in one byte. With an odd one a group begins
    # with a high nibble, and the pair's second column is in the next byte.
    if OFFSET_IS_ODD:
        k_second = k_first + 1
        second = tl.load(
            packed_ptr + (k_second >> 1).to(tl.int64)[:, None] * n + offs_n[None, :],
            mask=((k_second >= 0) & (k_second < k))[:, None] & in_n[None, :],
            other=0,
        )
        return first >> 4, second & 15
    else:
        return first & 15, first >> 4
