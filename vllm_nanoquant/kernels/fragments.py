# SPDX-License-Identifier: Apache-2.0
"""Triton: from the words of `layout.py` to operands of a matrix instruction, moving nothing.

Each function loads or reshapes so that Triton's layouts agree from the load to `tl.dot`, and a lane
keeps what it read: no shared memory, no barrier, no shuffle. `tests/kernels/test_compile.py` reads
the machine code and fails if a version of Triton decides otherwise; the result is right either way.
"""

from __future__ import annotations

import triton
import triton.language as tl
from packaging.version import Version

_triton = Version(triton.__version__)
# Of several equally good axes Triton gives the lanes of a load to the first before 3.7, to the last
# from then on. Loads name their axes accordingly.
FIRST_AXIS = tl.constexpr(_triton < Version("3.7"))
# An operand made by `tl.join` holds 4 neighbours of K per lane before 3.8, 2 from then on.
FOUR_WIDE = tl.constexpr(_triton < Version("3.8"))


@triton.jit
def magic_pairs(words: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Low nibble of each half word as bf16 (fp16), plus `magic_bias`: two exact numbers per word.

    The nibble becomes the last mantissa bits of 128 (1024), where one step is 1. One instruction;
    inline assembly because LLVM would handle the halves one by one.
    """
    if dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0x000f000f, 0x43004300, 0xea;",
            "=r,r",
            [words],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0x000f000f, 0x64006400, 0xea;",
            "=r,r",
            [words],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def magic_bias(dtype: tl.constexpr) -> float:
    """What `magic_pairs` adds to each integer."""
    return 128.0 if dtype == tl.bfloat16 else 1024.0


@triton.jit
def low_half(pairs: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """First number of each pair."""
    return pairs.to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def high_half(pairs: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Second number of each pair."""
    return (pairs >> 16).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def word_offsets(tile: tl.tensor, chunks: int) -> tl.tensor:
    """Offsets [T, 128] of the first half of tiles [T] in chunk 0; a chunk has 1024 words."""
    return ((tile // 4 * chunks) * 1024 + tile % 4 * 256)[:, None] + tl.arange(0, 128)[None, :]


@triton.jit
def scale_offsets(tile: tl.tensor, PER_CHUNK: tl.constexpr) -> tl.tensor:
    """Offsets of the scales of tiles [T] in chunk 0, for `load_scales`."""
    row = tl.arange(0, 8) * (2 * PER_CHUNK)
    column = tl.arange(0, 4) * 0
    last = tl.arange(0, 2 * PER_CHUNK)
    base = tile * (16 * PER_CHUNK)
    if FIRST_AXIS:
        return (
            column[:, None, None, None]
            + row[None, :, None, None]
            + base[None, None, :, None]
            + last[None, None, None, :]
        )
    else:
        return (
            base[:, None, None, None]
            + row[None, :, None, None]
            + column[None, None, :, None]
            + last[None, None, None, :]
        )


@triton.jit
def load_scales(pointers: tl.tensor, wanted: tl.tensor) -> tl.tensor:
    """Scale words [T, 8 rows, 4 lanes, 2 * groups per chunk] of the tiles [T] that are wanted."""
    if FIRST_AXIS:
        scales = tl.load(pointers, mask=wanted[None, None, :, None], other=0)
        return tl.permute(scales, (2, 1, 0, 3))
    else:
        return tl.load(pointers, mask=wanted[:, None, None, None], other=0)


@triton.jit
def scales_of_group(
    scales: tl.tensor, group: tl.constexpr, T: tl.constexpr, PER_CHUNK: tl.constexpr
) -> tl.tensor:
    """Scale words [T, 8 rows, 4 lanes, 2 = row / 8] of one of the groups of a chunk."""
    if PER_CHUNK == 1:
        return tl.reshape(scales, (T, 8, 4, 2))
    elif PER_CHUNK == 2:
        first, second = tl.split(tl.reshape(scales, (T, 8, 4, 2, 2)))
        return first if group == 0 else second
    else:
        even, odd = tl.split(tl.reshape(scales, (T, 8, 4, 2, 2, 2)))
        first, second = tl.split(even if group % 2 == 0 else odd)
        return first if group // 2 == 0 else second


@triton.jit
def load_chunk(
    words_ptr: tl.tensor, scales_ptr: tl.tensor, chunk: tl.tensor, wanted: tl.tensor, stride: int
) -> tl.tensor:
    """Words of both halves [T, 128] and scale words of a chunk; zeros where it is not wanted."""
    words = words_ptr + chunk * 1024
    mask = wanted[:, None]
    first = tl.load(words, mask=mask, other=0, eviction_policy="evict_first")
    second = tl.load(words + 128, mask=mask, other=0, eviction_policy="evict_first")
    return first, second, load_scales(scales_ptr + chunk * stride, wanted)
