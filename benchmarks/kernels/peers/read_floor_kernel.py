# SPDX-License-Identifier: Apache-2.0
"""A Triton kernel that reads words and does next to nothing with them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def read_kernel(words_ptr: tl.tensor, sums_ptr: tl.tensor, words: int, BLOCK: tl.constexpr) -> None:
    """Write the sum of BLOCK words, modulo 2**32, per program.

    `words_ptr` is int32 [words] with words a multiple of 16, so that each thread loads 16 bytes at
    a time; `sums_ptr` is int32 [ceil(words / BLOCK)].
    """
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(
        words_ptr + offsets, mask=offsets < words, other=0, eviction_policy="evict_first"
    )
    tl.store(sums_ptr + tl.program_id(0), tl.sum(values, axis=0))
