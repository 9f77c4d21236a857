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

from vllm_nanoquant.kernels.fragments import load_scales, scale_offsets, word_offsets
from vllm_nanoquant.kernels.layout import BLOCK, RuntimeWeight, ceil_div
from vllm_nanoquant.kernels.weights import half_weights

# One Mamba in_proj of Nemotron-Nano-9B-v2 (22656 x 4480) fits whole; the LM head goes in parts.
SCRATCH_BYTES = 200 << 20
TILES = 4
NUM_WARPS = 8

_scratch: dict[torch.device, torch.Tensor] = {}


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
) -> None:
    """Write w [rows, K], the weight from row 16 * first_tile on, rounded once to w's dtype."""
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    chunk = tl.program_id(0)
    own = tl.program_id(1) * T + tl.arange(0, T)
    tile = first_tile + own
    wanted = own * 16 < rows
    scales_at = scales_ptr + chunk * scale_stride + scale_offsets(tile, PER_CHUNK)
    scales = load_scales(scales_at, wanted)
    words_at = words_ptr + word_offsets(tile, chunks) + chunk * 1024
    row = tl.reshape(own[:, None] * 16 + tl.arange(0, 16)[None, :], (T * 16,))
    for half in tl.static_range(2):
        words = tl.load(
            words_at + half * 128, mask=wanted[:, None], other=0, eviction_policy="evict_first"
        )
        weights = half_weights(words, scales, half, T, PER_CHUNK, dtype)
        # tile, row % 8, lane's c, i / 2 % 2, row / 8, i % 2, i / 4, plane / 2
        weights = tl.reshape(weights, (T, 8, 4, 2, 2, 2, 2, 2))
        weights = tl.reshape(tl.permute(weights, (0, 4, 1, 7, 2, 6, 3, 5)), (T * 16, 64))
        column = chunk * 128 + half * 64 + tl.arange(0, 64) - group_offset
        inside = (row < rows)[:, None] & ((column >= 0) & (column < k))[None, :]
        tl.store(w_ptr + row[:, None] * k + column[None, :], weights, mask=inside)


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
        num_warps=NUM_WARPS,
    )


def rows_per_part(weight: RuntimeWeight, element_size: int) -> int:
    """Rows of the weight that are dequantized at a time: all, or a multiple of 64."""
    fitting = SCRATCH_BYTES // (weight.in_features * element_size) // BLOCK * BLOCK
    return min(weight.out_features, max(BLOCK, fitting))


def scratch_bytes(weight: RuntimeWeight, element_size: int) -> int:
    """Bytes of scratch that `prefill` uses for this weight."""
    return rows_per_part(weight, element_size) * weight.in_features * element_size


def reserve_scratch(device: torch.device, nbytes: int) -> torch.Tensor:
    """Return the device's scratch buffer (uint8), made larger first if it has fewer bytes."""
    buffer = _scratch.get(device)
    if buffer is None or buffer.numel() < nbytes:
        # The old one goes first: both together need not fit.
        _scratch.pop(device, None)
        buffer = None
        buffer = _scratch[device] = torch.empty(nbytes, dtype=torch.uint8, device=device)
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
