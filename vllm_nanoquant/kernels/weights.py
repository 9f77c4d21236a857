# SPDX-License-Identifier: Apache-2.0
"""Triton: words of `layout.py` to weights in bf16 or fp16, rounded once, in registers.

Two kernels share this: `fused.py` feeds the weights to the tensor cores, `prefill.py` writes them
out. In bf16 a pair of weights costs two instructions after unpacking: the zero point z is split
into a whole part, added to the integer exactly, and a rest of at most 1/2, so that
`w = (q + whole) * s + rest * s` is rounded once, to within 1/256 of half a step besides.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_nanoquant.kernels.fragments import (
    high_half,
    low_half,
    magic_bias,
    magic_pairs,
    scales_of_group,
)


@triton.jit
def fma_pairs(a: tl.tensor, b: tl.tensor, c: tl.tensor) -> tl.tensor:
    """Compute a * b + c on pairs of bf16, rounded once; SM80 has no other arithmetic on pairs."""
    return tl.inline_asm_elementwise(
        "fma.rn.bf16x2 $0, $1, $2, $3;",
        "=r,r,r,r",
        [a, b, c],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def for_each_word(scales: tl.tensor, T: tl.constexpr) -> tl.tensor:
    """[T, 8 rows, 4 lanes, 2] per row as [T, 128] per word; the words of a row differ in i / 2."""
    scales = tl.broadcast_to(scales[:, :, :, None, :], (T, 8, 4, 2, 2))
    return tl.reshape(scales, (T, 128))


@triton.jit
def prepare_scales(group: tl.tensor, T: tl.constexpr, dtype: tl.constexpr) -> tl.tensor:
    """Three factors [T, 128] for `plane_weights`, of scale words [T, 8, 4, 2] of one group."""
    if dtype == tl.bfloat16:
        one = tl.full(group.shape, 0x3F803F80, tl.int32)
        scale = (group & 0xFFFF) | (group << 16)
        zero = ((group >> 16) & 0xFFFF) | (group & -65536)
        # Near 128 a step of bf16 is 1, so adding -128 rounds z to a whole number (0xc300 = -128).
        shift = fma_pairs(zero, one, tl.full(group.shape, -0x3CFF3D00, tl.int32))
        whole = fma_pairs(shift, one, tl.full(group.shape, 0x43004300, tl.int32))
        rest = fma_pairs(whole, tl.full(group.shape, -0x407F4080, tl.int32), zero)
        # 0x8000 = -0.0, the neutral element of addition
        rest = fma_pairs(rest, scale, tl.full(group.shape, -0x7FFF8000, tl.int32))
        return for_each_word(shift, T), for_each_word(scale, T), for_each_word(rest, T)
    else:
        scale = (group << 16).to(tl.float32, bitcast=True)
        zero = (group & -65536).to(tl.float32, bitcast=True) - magic_bias(dtype)
        return for_each_word(zero, T), for_each_word(scale, T), for_each_word(scale, T)


@triton.jit
def plane_weights(
    words: tl.tensor,
    plane: tl.constexpr,
    shift: tl.tensor,
    scale: tl.tensor,
    rest: tl.tensor,
    dtype: tl.constexpr,
) -> tl.tensor:
    """Weights [T, 128, 2] of a nibble plane of words [T, 128]; the last axis is i % 2."""
    pairs = magic_pairs(words >> (4 * plane), dtype)
    if dtype == tl.bfloat16:
        one = tl.full(pairs.shape, 0x3F803F80, tl.int32)
        pairs = fma_pairs(fma_pairs(pairs, one, shift), scale, rest)
        return tl.join(low_half(pairs, dtype), high_half(pairs, dtype))
    else:
        low = (low_half(pairs, dtype).to(tl.float32) + shift) * scale
        high = (high_half(pairs, dtype).to(tl.float32) + shift) * scale
        return tl.join(low.to(dtype), high.to(dtype))


@triton.jit
def half_weights(
    words: tl.tensor,
    scales: tl.tensor,
    half: tl.constexpr,
    T: tl.constexpr,
    PER_CHUNK: tl.constexpr,
    dtype: tl.constexpr,
) -> tl.tensor:
    """Weights [T, 128, i % 2, i / 4, plane / 2] of one half (64 columns) of a chunk."""
    group: tl.constexpr = 2 * half * PER_CHUNK // 4
    shift, scale, rest = prepare_scales(scales_of_group(scales, group, T, PER_CHUNK), T, dtype)
    first = tl.join(
        plane_weights(words, 0, shift, scale, rest, dtype),
        plane_weights(words, 1, shift, scale, rest, dtype),
    )
    if PER_CHUNK == 4:
        shift, scale, rest = prepare_scales(
            scales_of_group(scales, group + 1, T, PER_CHUNK), T, dtype
        )
    second = tl.join(
        plane_weights(words, 2, shift, scale, rest, dtype),
        plane_weights(words, 3, shift, scale, rest, dtype),
    )
    return tl.join(first, second)
