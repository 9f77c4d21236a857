# SPDX-License-Identifier: Apache-2.0
"""Random W4A16 problems, their fp64 solution, and the error measure, for every kernel test."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_nanoquant.kernels.layout import RuntimeWeight
from vllm_nanoquant.kernels.reference import dequantize
from vllm_nanoquant.kernels.settings import FusedSettings, Work
from vllm_nanoquant.quantize.groups import QuantizedWeight, group_count, pack_nibbles

# Mean |y - expected| / mean |expected| that any implementation may reach with bf16 tokens.
TOLERANCE = 5e-3


def random_weight(
    out_features: int,
    in_features: int,
    group_size: int,
    group_offset: int = 0,
    device: str = "cpu",
) -> QuantizedWeight:
    """A weight with every integer, scales of uneven size and zero points that are not whole."""
    groups = group_count(in_features, group_size, group_offset)
    shape = (groups, out_features)
    q = torch.randint(0, 16, (out_features, in_features), dtype=torch.uint8, device=device)
    scale = (torch.rand(shape, device=device) * 0.01 + 0.001).to(torch.bfloat16)
    zero_point = (-15 * torch.rand(shape, device=device)).to(torch.bfloat16)
    packed = pack_nibbles(q)
    return QuantizedWeight(packed, scale, zero_point, group_size, in_features, group_offset)


class FewPrograms(FusedSettings):
    """As many programs as `per_multiprocessor` says, whatever the GPU, that share what they can."""

    def share_out(self, tiles: int, chunks: int, multiprocessors: int) -> Work:
        """Tiles of its own for each program, and all of them for the rest."""
        programs = self.per_multiprocessor
        own, rest = divmod(tiles, programs)
        sharers = min(programs, rest * chunks)
        # The first tile that is left has two programs of its own, where there are enough.
        if rest > 1 and chunks > 1 and sharers > 2:
            return Work(programs, own, 1, 2, min(sharers - 2, (rest - 1) * chunks))
        return Work(programs, own, rest, sharers, 0)


@dataclass
class Problem:
    """One product: x [..., K], a weight [N, K] and a bias [N] or none."""

    x: torch.Tensor
    weight: QuantizedWeight
    bias: torch.Tensor | None

    def arguments(self) -> tuple[torch.Tensor, RuntimeWeight, torch.Tensor | None]:
        """What the kernels take."""
        return (self.x, RuntimeWeight.from_quantized(self.weight), self.bias)

    def expected(self) -> torch.Tensor:
        """The product in fp64."""
        values = dequantize(self.weight, dtype=torch.float64)
        y = self.x.double() @ values.t()
        return y if self.bias is None else y + self.bias.double()


def random_problem(
    tokens: int,
    out_features: int,
    in_features: int,
    group_size: int = 128,
    group_offset: int = 0,
    *,
    bias: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
) -> Problem:
    """A problem from the global random state."""
    weight = random_weight(out_features, in_features, group_size, group_offset, device)
    x = torch.randn(tokens, in_features, device=device).to(dtype)
    extra = torch.randn(out_features, device=device).to(dtype) if bias else None
    return Problem(x, weight, extra)


def mean_relative_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    """Mean |y - expected| / mean |expected|; NaN anywhere gives NaN."""
    return float((y.double() - expected).abs().mean() / expected.abs().mean())
