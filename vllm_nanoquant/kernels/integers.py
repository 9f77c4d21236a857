# SPDX-License-Identifier: Apache-2.0
"""Triton: nibbles as integers that tensor cores multiply, and x to match.

Two forms, both exact. *Magic*: 128 + q (fp16: 1024 + q), the nibble in the last bits of a number
whose step is 1; three shifts per word, and the 128 is taken off the zero point. *Subnormal*, bf16
only: the low 8 bits of a bf16 whose exponent is 0 or 1 are an integer that counts steps of 2^-133.
That is room for two nibbles, so one shift per word will do; those of odd planes stand for 16 times
themselves. x is multiplied by 2^64, or 2^60 for odd planes, so that no product in fp32 is
subnormal itself, and the sums by 2^69 at the end: exact, for |x| between 2^-57 and 2^63.

Not documented is whether tensor cores keep subnormals; `keeps_subnormals` tries it out.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from vllm_nanoquant.kernels.fragments import high_half, low_half, magic_bias, magic_pairs

_UNIT_OF_SUMS = tl.constexpr(2.0 ** (64 - 133))
# x * factor - 0.0 for two bf16; -0.0 is the neutral element of addition.
_TIMES = "{{ .reg .b32 a, b; mov.b32 a, {0}; mov.b32 b, 0x80008000; fma.rn.bf16x2 $0, $1, a, b; }}"
_TIMES_2_64 = tl.constexpr(_TIMES.format("0x5f805f80"))
_TIMES_2_60 = tl.constexpr(_TIMES.format("0x5d805d80"))


@triton.jit
def subnormal_pairs(words: tl.tensor, plane: tl.constexpr) -> tl.tensor:
    """Nibbles of a plane, two per word: bf16 of q * 2^-133, in odd planes of 16 times that."""
    if plane >= 2:
        words = words >> 8
    return words & (0x00F000F0 if plane % 2 == 1 else 0x000F000F)


@triton.jit
def integer_pairs(
    words: tl.tensor, plane: tl.constexpr, dtype: tl.constexpr, SUBNORMAL: tl.constexpr
) -> tl.tensor:
    """Two integers per word, of a nibble plane, as pairs of `dtype`."""
    if SUBNORMAL:
        return subnormal_pairs(words, plane)
    else:
        return magic_pairs(words >> (4 * plane), dtype)


@triton.jit
def times_power(x: tl.tensor, plane: tl.constexpr) -> tl.tensor:
    """Compute x * 2^64, for odd planes x * 2^60, in bf16.

    Inline assembly because Triton multiplies single bf16, and before SM90 in fp32.
    """
    return tl.inline_asm_elementwise(
        _TIMES_2_60 if plane % 2 == 1 else _TIMES_2_64,
        "=r,r",
        [x],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=2,
    )


@triton.jit
def matched(x: tl.tensor, plane: tl.constexpr, SUBNORMAL: tl.constexpr) -> tl.tensor:
    """Tokens as the integers of a plane need them."""
    return times_power(x, plane) if SUBNORMAL else x


@triton.jit
def zero_points(group: tl.tensor, dtype: tl.constexpr, SUBNORMAL: tl.constexpr) -> tl.tensor:
    """Zero points of scale words in fp32, to go with the sums: in their unit, or less the 128."""
    zero = (group & -65536).to(tl.float32, bitcast=True)
    return zero * _UNIT_OF_SUMS if SUBNORMAL else zero - magic_bias(dtype)


@triton.jit
def values_of_sums(y: tl.tensor, SUBNORMAL: tl.constexpr) -> tl.tensor:
    """Sums of products with `matched` tokens as products with x."""
    return y * (1 / _UNIT_OF_SUMS) if SUBNORMAL else y


@triton.jit
def probe_kernel(words_ptr: tl.tensor, y_ptr: tl.tensor) -> None:
    """Multiply planes 0 and 1 of words [16, 8] by ones, as `decode.py` does: fp32 [2, 16, 8]."""
    row = tl.arange(0, 16)[None, :, None]
    column = tl.arange(0, 8)[None, None, :]
    words = tl.load(words_ptr + row * 8 + column)
    one = tl.full((1, 16, 8), 1.0, tl.bfloat16)
    for plane in tl.static_range(2):
        pairs = subnormal_pairs(words, plane)
        halves = tl.join(low_half(pairs, tl.bfloat16), high_half(pairs, tl.bfloat16))
        y = tl.dot(tl.reshape(halves, (1, 16, 16)), times_power(one, plane))
        tl.store(y_ptr + plane * 128 + row * 8 + column, y * (1 / _UNIT_OF_SUMS))


@functools.cache
def keeps_subnormals(device: torch.device) -> bool:
    """Whether the tensor cores of a GPU multiply subnormal bf16 numbers as they are.

    Waits for the GPU the first time, so it has to be asked before a CUDA graph is captured;
    compiling a weight's kernels does that. Other devices: False.
    """
    if device.type != "cuda":
        return False
    words = torch.arange(128, dtype=torch.int32, device=device) * 0x01030507
    words = words.reshape(16, 8)
    y = torch.empty((2, 16, 8), dtype=torch.float32, device=device)
    probe_kernel[(1,)](words, y, num_warps=1)
    expected = [
        sum((words >> shift & 15).sum(dim=1, dtype=torch.float32) for shift in (start, start + 16))
        for start in (0, 4)
    ]
    return bool((y == torch.stack(expected)[:, :, None]).all())
