# SPDX-License-Identifier: Apache-2.0
"""GemLite's Triton kernels, if the package `gemlite` is installed."""

from __future__ import annotations

import torch

from benchmarks.kernels.peers.base import Peer, importable, require_whole_groups
from benchmarks.kernels.peers.symmetric import ZERO, PackedWeight, quantize_symmetric

# It tunes itself, for seconds, at each new shape and number of tokens.
ONLY_TOKENS = frozenset((1, 8, 16, 64))


def prepare(dense: torch.Tensor, group_size: int) -> PackedWeight:
    """Quantize dense, bf16 [N, K], and let GemLite pack it, with one whole zero point for all."""
    n, k = dense.shape
    require_whole_groups(k, group_size)
    gemlite = importable("gemlite")
    source = quantize_symmetric(dense, group_size)
    layer = gemlite.GemLiteLinear(
        4,
        group_size=group_size,
        in_features=k,
        out_features=n,
        input_dtype=gemlite.DType.BF16,
        output_dtype=gemlite.DType.BF16,
    )
    layer.pack(source.integers, source.scale, ZERO, None)
    packed, scale, *others = (tensor.data for tensor in layer.get_tensor_args())
    settings = layer.get_meta_args()

    def product(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return gemlite.forward_functional(x, None, [packed, scale, *others], settings)

    return PackedWeight(source, packed, scale, product)


PEER = Peer("gemlite", prepare, only_tokens=ONLY_TOKENS)
