# SPDX-License-Identifier: Apache-2.0
"""Symmetric int4 weights, and how other kernels pack them: W = (q - 8) * scale.

The kernels that we compare with have no zero points that are not whole numbers, and are fastest
with none at all. vLLM calls this type uint4b8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from benchmarks.kernels.peers.base import require_whole_groups

ZERO = 8
# Rows quantized at a time: temporaries of the LM head stay under 1 GB each.
CHUNK_ROWS = 8192


@dataclass(frozen=True)
class Symmetric:
    """Integers and scales of a weight [N, K].

    Attributes:
        integers: uint8 [N, K], values 0 to 15.
        scale: bf16 [N, K / group_size].
        group_size: columns per scale; divides K.
    """

    integers: torch.Tensor
    scale: torch.Tensor
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return (self.integers.shape[0], self.integers.shape[1])

    def exact(self) -> torch.Tensor:
        """(q - 8) * scale in fp64: [N, K]."""
        n, k = self.shape
        weight = self.integers.double().sub_(ZERO).view(n, -1, self.group_size)
        return weight.mul_(self.scale.double().unsqueeze(-1)).view(n, k)


def quantize_symmetric(dense: torch.Tensor, group_size: int) -> Symmetric:
    """Quantize dense, bf16 [N, K]: round to nearest, -8 to 7 times the scale of the group.

    Raises:
        GroupRefused: the groups do not divide K.
    """
    n, k = dense.shape
    require_whole_groups(k, group_size)
    integers = torch.empty((n, k), dtype=torch.uint8, device=dense.device)
    scale = torch.empty((n, k // group_size), dtype=torch.bfloat16, device=dense.device)
    for start in range(0, n, CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        values = dense[rows].float().view(-1, k // group_size, group_size)
        # The scale that neither the greatest nor the least value of the group leaves.
        wanted = torch.maximum(values.amax(-1) / 7, values.amin(-1) / -ZERO).clamp_(min=1e-8)
        scale[rows] = wanted
        rounded = (values / scale[rows].float().unsqueeze(-1)).round_().clamp_(-ZERO, 7)
        integers[rows] = rounded.add_(ZERO).view(-1, k).to(torch.uint8)
    return Symmetric(integers, scale, group_size)


@dataclass(frozen=True)
class PackedWeight:
    """A symmetric weight as one kernel packs it.

    Attributes:
        source: the integers and scales; all copies share them.
        packed: the integers, in whatever order the kernel wants.
        scale: the scales, likewise.
        product: from x, bf16 [M, K], `packed` and `scale` to bf16 [M, N].
    """

    source: Symmetric
    packed: torch.Tensor
    scale: torch.Tensor
    product: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

    @property
    def group_size(self) -> int:
        """Columns per scale."""
        return self.source.group_size

    @property
    def nbytes(self) -> int:
        """Bytes of integers and scales."""
        return self.packed.nbytes + self.scale.nbytes

    def copy(self) -> PackedWeight:
        """The same weight in other memory."""
        return replace(self, packed=self.packed.clone(), scale=self.scale.clone())

    def call(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x, bf16 [M, K]: bf16 [M, N]."""
        return self.product(x, self.packed, self.scale)

    def exact(self) -> torch.Tensor:
        """(q - 8) * scale in fp64: [N, K]."""
        return self.source.exact()


def pack_eight(integers: torch.Tensor) -> torch.Tensor:
    """Pack uint8 [R, C], values 0 to 15, along C: int32 [R, C / 8], the first in the low bits."""
    words = torch.zeros(
        (integers.shape[0], integers.shape[1] // 8), dtype=torch.int32, device=integers.device
    )
    for place in range(8):
        words |= integers[:, place::8].to(torch.int32) << (4 * place)
    return words
