# SPDX-License-Identifier: Apache-2.0
"""Product of many tokens with an int4 weight: dequantize into a scratch buffer, then cuBLAS.

The scratch is one buffer per device for the whole model, as large as the largest weight asks for
but at most SCRATCH_BYTES, allocated while the model is loaded (`reserve_scratch`). A larger weight
goes through it in parts. Work on one stream at a time may use it, as prefill does in vLLM.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_nanoquant.kernels.fragments import (
    FIRST_AXIS,
    load_chunk,
    scale_offsets,
    word_offsets,
)
from vllm_nanoquant.kernels.layout import BLOCK, RuntimeWeight, ceil_div
from vllm_nanoquant.kernels.overlap import wait_for_kernel_before
from vllm_nanoquant.kernels.settings import launch_options
from vllm_nanoquant.kernels.weights import half_weights

# One Mamba in_proj of Nemotron-Nano-9B-v2 (22656 x 4480) fits whole; the LM head goes in parts.
SCRATCH_BYTES = 200 << 20
TILES = 4
# Two for each tile, which exchange what they store. With one they need not, but on an H200 that
# takes 4 % longer.
NUM_WARPS = 8

_scratch: dict[torch.device, torch.Tensor] = {}
# Buffers whose addresses are in CUDA graphs, which may be replayed when a larger one serves.
_captured: set[torch.Tensor] = set()


@triton.jit
def rows_of_block(tile: tl.tensor) -> tl.tensor:
    """Rows of tiles [T] as `in_block` has them; they broadcast to its shape."""
    row = tl.arange(0, 8)
    other = tl.arange(0, 4) // 2 * 8
    if FIRST_AXIS:
        return (
            row[None, :, None, None, None]
            + (tile * 16)[None, None, :, None, None]
            + other[None, None, None, :, None]
        )
    else:
        return (
            other[:, None, None, None, None]
            + (tile * 16)[None, :, None, None, None]
            + row[None, None, :, None, None]
        )


@triton.jit
def columns_of_block() -> tl.tensor:
    """Columns of half a chunk as `in_block` has them; they broadcast to its shape."""
    lane = tl.arange(0, 4) * 8
    run = tl.arange(0, 4) % 2 * 32
    i = tl.arange(0, 8)[None, None, None, None, :]
    if FIRST_AXIS:
        return lane[:, None, None, None, None] + run[None, None, None, :, None] + i
    else:
        return run[:, None, None, None, None] + lane[None, None, None, :, None] + i


@triton.jit
def in_block(weights: tl.tensor, T: tl.constexpr) -> tl.tensor:
    """Weights of `half_weights` with runs of 8 columns last: 16 bytes, which one lane stores.

    [lane's c, row % 8, T, 2 * (row / 8) + plane / 2, i], or, where Triton deals lanes out from the
    last axis, [2 * (row / 8) + plane / 2, T, row % 8, lane's c, i].
    """
    # tile, row % 8, lane's c, i / 2 % 2, row / 8, i % 2, i / 4, plane / 2
    weights = tl.reshape(weights, (T, 8, 4, 2, 2, 2, 2, 2))
    if FIRST_AXIS:
        return tl.reshape(tl.permute(weights, (2, 1, 0, 4, 7, 6, 3, 5)), (4, 8, T, 4, 8))
    else:
        return tl.reshape(tl.permute(weights, (4, 7, 0, 1, 2, 6, 3, 5)), (4, T, 8, 4, 8))


@triton.jit(do_not_specialize=["chunks", "first_tile", "rows"])
def dequantize_kernel(
    words_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    w_ptr: tl.tensor,
    first_tile: int,
    rows: int,
    k: int,
    chunks: int,
    scale_stride: int,
    group_offset: int,
    PER_CHUNK: tl.constexpr,
    T: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Write w [rows, K], the weight from row 16 * first_tile on, rounded once to w's dtype."""
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    chunk = tl.program_id(0)
    own = tl.program_id(1) * T + tl.arange(0, T)
    wanted = own * 16 < rows
    words_at = words_ptr + word_offsets(first_tile + own, chunks)
    scales_at = scales_ptr + scale_offsets(first_tile + own, PER_CHUNK)
    words_0, words_1, scales = load_chunk(words_at, scales_at, chunk, wanted, scale_stride)
    if PDL:
        # Weights do not depend on the kernel before this one; it may still read w.
        wait_for_kernel_before()
    row = rows_of_block(own)
    for half in tl.static_range(2):
        words = words_0 if half == 0 else words_1
        weights = in_block(half_weights(words, scales, half, T, PER_CHUNK, dtype), T)
        column = chunk * 128 + half * 64 + columns_of_block() - group_offset
        inside = (row < rows) & (column >= 0) & (column < k)
        tl.store(w_ptr + row * k + column, weights, mask=inside)


def dequantize_rows(weight: RuntimeWeight, out: torch.Tensor, first: int) -> None:
    """Write rows `first` onwards of the weight [N, K] into out [rows, K], bf16 or fp16.

    `first` is a multiple of 64, `out` is contiguous, and first + rows <= N.
    """
    rows, k = out.shape
    chunks = weight.chunks
    dequantize_kernel[(chunks, ceil_div(rows, 16 * TILES))](
        weight.words,
        weight.scales,
        out,
        first // 16,
        rows,
        k,
        chunks,
        weight.scale_stride,
        weight.group_offset,
        PER_CHUNK=weight.groups_per_chunk,
        T=TILES,
        **launch_options(out.device, NUM_WARPS, num_stages=1),
    )


def rows_per_part(weight: RuntimeWeight, element_size: int) -> int:
    """Rows of the weight that are dequantized at a time: all, or a multiple of 64."""
    fitting = SCRATCH_BYTES // (weight.in_features * element_size) // BLOCK * BLOCK
    return min(weight.out_features, max(BLOCK, fitting))


def scratch_bytes(weight: RuntimeWeight, element_size: int) -> int:
    """Bytes of scratch that `prefill` uses for this weight."""
    return rows_per_part(weight, element_size) * weight.in_features * element_size


def reserve_scratch(device: torch.device, nbytes: int) -> torch.Tensor:
    """Return the device's scratch buffer (uint8), made larger first if it has fewer bytes.

    One that is handed out while a CUDA graph is captured stays for good.
    """
    buffer = _scratch.get(device)
    if buffer is None or buffer.numel() < nbytes:
        # The old one goes first: both together need not fit.
        _scratch.pop(device, None)
        buffer = None
        buffer = _scratch[device] = torch.empty(nbytes, dtype=torch.uint8, device=device)
    if torch.cuda.is_current_stream_capturing():
        _captured.add(buffer)
    return buffer


def prefill(x: torch.Tensor, weight: RuntimeWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """Multiply x [M, K] by a transposed int4 weight [N, K], add bias [N]: [M, N] in x.dtype.

    Tensors as in `decode`, for any M >= 1.
    """
    n, k = weight.shape
    step = rows_per_part(weight, x.element_size())
    scratch = reserve_scratch(x.device, scratch_bytes(weight, x.element_size())).view(x.dtype)
    y = torch.empty((x.shape[0], n), dtype=x.dtype, device=x.device)
    for first in range(0, n, step):
        rows = slice(first, min(first + step, n))
        count = rows.stop - first
        part = scratch[: count * k].view(count, k)
        dequantize_rows(weight, part, first)
        if bias is None:
            torch.mm(x, part.t(), out=y[:, rows])
        else:
            torch.addmm(bias[rows], x, part.t(), out=y[:, rows])
    return y
