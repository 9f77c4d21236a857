# SPDX-License-Identifier: Apache-2.0
"""vLLM's W4A16 kernel in Triton, written for AMD's GPUs; it runs on others too."""

from __future__ import annotations

import torch

from benchmarks.kernels.peers.base import Peer, importable
from benchmarks.kernels.peers.symmetric import ZERO, PackedWeight, pack_eight, quantize_symmetric
from benchmarks.kernels.peers.vllm_kernels import KERNELS, ask

MOST_TOKENS = 64


def prepare(dense: torch.Tensor, group_size: int) -> PackedWeight:
    """Quantize dense, bf16 [N, K], and pack it along N."""
    ask("TritonW4A16LinearKernel", dense, group_size)
    gemm = importable(f"{KERNELS}.triton_w4a16").triton_w4a16_gemm
    source = quantize_symmetric(dense, group_size)
    packed = pack_eight(source.integers.t())  # [K, N / 8]

    def product(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return gemm(a=x, b_q=packed, scales=scale, qzeros=None, group_size=group_size, zp_bias=ZERO)

    return PackedWeight(source, packed, source.scale.t().contiguous(), product)


PEER = Peer("triton_w4a16", prepare, most_tokens=MOST_TOKENS)
