# SPDX-License-Identifier: Apache-2.0
"""Marlin as vLLM serves it, on a symmetric weight."""

from __future__ import annotations

import torch

from benchmarks.kernels.peers.base import Peer, importable
from benchmarks.kernels.peers.symmetric import PackedWeight, pack_eight, quantize_symmetric
from benchmarks.kernels.peers.vllm_kernels import ask, custom_ops, uint4b8

UTILS = "vllm.model_executor.layers.quantization.utils.marlin_utils"


def prepare(dense: torch.Tensor, group_size: int) -> PackedWeight:
    """Quantize dense, bf16 [N, K], and pack it as vLLM packs a GPTQ checkpoint for Marlin.

    A shape that Marlin's tiles do not divide is padded, and the padding is part of the time, as it
    is part of serving.
    """
    ask("MarlinLinearKernel", dense, group_size)
    utils, ops, kind = importable(UTILS), custom_ops(), uint4b8()
    n, k = dense.shape
    source = quantize_symmetric(dense, group_size)
    padded_n, padded_k = utils.marlin_padded_nk(n, k, group_size)
    empty = utils.marlin_make_empty_g_idx(dense.device)
    workspace = utils.marlin_make_workspace_new(dense.device)
    integers = pack_eight(source.integers).t().contiguous()  # [K / 8, N]
    packed = ops.gptq_marlin_repack(
        utils.marlin_pad_qweight(integers, n, k, padded_n, padded_k),
        perm=empty,
        size_k=padded_k,
        size_n=padded_n,
        num_bits=4,
    )
    scale = utils.marlin_permute_scales(
        utils.marlin_pad_scales(
            source.scale.t().contiguous(), n, k, padded_n, padded_k, group_size
        ),
        size_k=padded_k,
        size_n=padded_n,
        group_size=group_size,
    )

    def product(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return utils.apply_gptq_marlin_linear(
            input=x,
            weight=packed,
            weight_scale=scale,
            weight_zp=empty,
            g_idx=empty,
            g_idx_sort_indices=empty,
            workspace=workspace,
            wtype=kind,
            output_size_per_partition=n,
            input_size_per_partition=k,
            is_k_full=True,
        )

    return PackedWeight(source, packed, scale, product)


PEER = Peer("marlin", prepare)
