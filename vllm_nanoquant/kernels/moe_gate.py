# SPDX-License-Identifier: Apache-2.0
"""Triton: the activation of gated experts, between their two products."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_nanoquant.kernels.layout import ceil_div

COLUMNS = 1024


@triton.jit
def gate_kernel(
    h_ptr: tl.tensor,
    gated_ptr: tl.tensor,
    width: int,
    GELU: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Write gated [pairs, width] = act(h[:, :width]) * h[:, width:]; act is SiLU or GELU."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(0).to(tl.int64)
    inside = column < width
    h = h_ptr + row * 2 * width + column
    gate = tl.load(h, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(h + width, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        gate = gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        gate = gate / (1.0 + tl.exp(-gate))
    out = gated_ptr + row * width + column
    tl.store(out, (gate * up).to(gated_ptr.dtype.element_ty), mask=inside)


def gated(h: torch.Tensor, activation: str) -> torch.Tensor:
    """Turn h [pairs, 2 * I] into [pairs, I]: the activation of the first half times the second.

    Computed in fp32; `activation` is "silu" or "gelu" (with erf).
    """
    pairs, width = h.shape[0], h.shape[1] // 2
    out = torch.empty((pairs, width), dtype=h.dtype, device=h.device)
    # The pairs go first: the second axis of a grid ends at 65535.
    gate_kernel[(pairs, ceil_div(width, COLUMNS))](
        h, out, width, GELU=activation == "gelu", COLUMNS=COLUMNS, num_warps=4
    )
    return out
