# SPDX-License-Identifier: Apache-2.0
"""Machete, vLLM's CUTLASS kernel for Hopper, on a symmetric weight."""

from __future__ import annotations

import torch

from benchmarks.kernels.peers.base import Peer
from benchmarks.kernels.peers.symmetric import PackedWeight, pack_eight, quantize_symmetric
from benchmarks.kernels.peers.vllm_kernels import ask, custom_ops, uint4b8


def prepare(dense: torch.Tensor, group_size: int) -> PackedWeight:
    """Quantize dense, bf16 [N, K], and pack it for Machete; it chooses its own schedule."""
    ask("MacheteLinearKernel", dense, group_size)
    ops, kind = custom_ops(), uint4b8()
    source = quantize_symmetric(dense, group_size)
    packed = ops.machete_prepack_B(
        pack_eight(source.integers).t(),  # [K / 8, N], column-major
        a_type=torch.bfloat16,
        b_type=kind,
        group_scales_type=torch.bfloat16,
    )

    def product(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return ops.machete_mm(
            a=x,
            b_q=packed,
            b_type=kind,
            b_group_scales=scale,
            b_group_size=group_size,
        )

    return PackedWeight(source, packed, source.scale.t().contiguous(), product)


PEER = Peer("machete", prepare)
