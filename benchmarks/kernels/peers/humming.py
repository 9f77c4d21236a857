# SPDX-License-Identifier: Apache-2.0
"""Humming, which compiles its kernels when they are called, if `humming-kernels` is installed."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch

from benchmarks.kernels.peers.base import Peer, importable, require_whole_groups
from benchmarks.kernels.peers.symmetric import Symmetric, pack_eight, quantize_symmetric

# What vLLM pads a shape to.
MULTIPLE_OF_N = 256
MULTIPLE_OF_K = 128


@dataclass(frozen=True)
class HummingWeight:
    """A symmetric weight [N, K] in a layer of Humming's.

    Attributes:
        source: the integers and scales; all copies share them.
        layer: a HummingLayer, transformed.
    """

    source: Symmetric
    layer: torch.nn.Module

    @property
    def group_size(self) -> int:
        """Columns per scale."""
        return self.source.group_size

    @property
    def nbytes(self) -> int:
        """Bytes of integers and scales, padding included."""
        return sum(parameter.nbytes for parameter in self.layer.parameters())

    def copy(self) -> HummingWeight:
        """The same weight in other memory."""
        return HummingWeight(self.source, deepcopy(self.layer))

    def call(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x, bf16 [M, K]: bf16 [M, N]."""
        return self.layer(x)

    def exact(self) -> torch.Tensor:
        """(q - 8) * scale in fp64: [N, K]."""
        return self.source.exact()


def prepare(dense: torch.Tensor, group_size: int) -> HummingWeight:
    """Quantize dense, bf16 [N, K], and load it into a layer of Humming's, padded as vLLM does."""
    n, k = dense.shape
    require_whole_groups(k, group_size)
    humming = importable("humming.layer")
    source = quantize_symmetric(dense, group_size)
    layer = humming.HummingLayer(
        shape_n=n,
        shape_k=k,
        weight_config={"dtype": "int4", "group_size": group_size},
        pad_n_to_multiple=MULTIPLE_OF_N,
        pad_k_to_multiple=MULTIPLE_OF_K,
        torch_dtype=torch.bfloat16,
    ).to(dense.device)
    layer.load_from_tensors({"weight": pack_eight(source.integers), "weight_scale": source.scale})
    layer.transform()
    return HummingWeight(source, layer)


PEER = Peer("humming", prepare)
