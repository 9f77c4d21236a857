# SPDX-License-Identifier: Apache-2.0
"""This project's op, `vllm_nanoquant.kernels.ops.w4a16`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.kernels.peers.base import Peer
from vllm_nanoquant.kernels.layout import RuntimeWeight
from vllm_nanoquant.kernels.ops import w4a16, warm_up
from vllm_nanoquant.kernels.reference import dequantize
from vllm_nanoquant.quantize.groups import QuantizedWeight
from vllm_nanoquant.quantize.minmax import quantize_minmax


@dataclass(frozen=True)
class OurWeight:
    """An int4 weight [N, K] with bf16 scales and zero points.

    Attributes:
        source: as it was quantized; all copies share it.
        weight: as the op takes it.
    """

    source: QuantizedWeight
    weight: RuntimeWeight

    @property
    def group_size(self) -> int:
        """Columns per group; the last may have fewer."""
        return self.source.group_size

    @property
    def nbytes(self) -> int:
        """Bytes of integers, scales and zero points."""
        return self.weight.nbytes

    def copy(self) -> OurWeight:
        """The same weight in other memory."""
        return OurWeight(self.source, self.weight.clone())

    def call(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x, bf16 [M, K]: bf16 [M, N]."""
        return w4a16(x, self.weight, bias=None)

    def exact(self) -> torch.Tensor:
        """(q + zero point) * scale in fp64: [N, K]."""
        return dequantize(self.source, dtype=torch.float64)


def prepare(dense: torch.Tensor, group_size: int) -> OurWeight:
    """Quantize dense, bf16 [N, K], by min-max, and compile every kernel that may run."""
    source = quantize_minmax(dense, group_size)
    weight = RuntimeWeight.from_quantized(source)
    warm_up(weight, dtype=dense.dtype)
    return OurWeight(source, weight)


PEER = Peer("ours", prepare)
