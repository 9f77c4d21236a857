# SPDX-License-Identifier: Apache-2.0
"""The weight as it was, through cuBLAS."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.kernels.peers.base import Peer


@dataclass(frozen=True)
class DenseWeight:
    """bf16 [N, K], contiguous.

    Attributes:
        weight: the values.
        group_size: None; there are no groups.
    """

    weight: torch.Tensor
    group_size: None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.weight.nbytes

    def copy(self) -> DenseWeight:
        """The same weight in other memory."""
        return DenseWeight(self.weight.clone())

    def call(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x, bf16 [M, K]: bf16 [M, N]."""
        return torch.nn.functional.linear(x, self.weight)

    def exact(self) -> torch.Tensor:
        """The values in fp64: [N, K]."""
        return self.weight.double()


PEER = Peer("bf16", lambda dense, group_size: DenseWeight(dense))
