# SPDX-License-Identifier: Apache-2.0
"""The int4 weights of a layer's experts, put together part by part.

checkpoint         gate_proj or up_proj     up_proj, beside a gate     down_proj
vLLM's shard       w1                       w3                         w2
vLLM's matrix      w13, rows of w1          w13, rows of w3            w2
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from vllm_nanoquant.kernels.experts import ExpertWeights
from vllm_nanoquant.layers.stored_linear import fill_with_dummies
from vllm_nanoquant.quantize.groups import QuantizedWeight, group_count, join_rows

MATRICES = ("w13", "w2")
"""vLLM's names for what the first product multiplies by, gate and up in one, and the second."""


def matrix_of(shard: str) -> str:
    """The matrix that w1, w2 or w3 is part of."""
    return "w2" if shard == "w2" else "w13"


@dataclass(frozen=True)
class Cut:
    """A rank's part of one tensor of one expert.

    Attributes:
        whole: shape of the tensor in the checkpoint.
        axis: dimension that is split over the ranks.
        first: where the part begins.
        count: its size.
    """

    whole: tuple[int, ...]
    axis: int
    first: int
    count: int

    def shape(self, times: int = 1) -> tuple[int, ...]:
        """Shape of the part, or of so many of them one behind the other."""
        return (*self.whole[: self.axis], times * self.count, *self.whole[self.axis + 1 :])

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of a tensor."""
        return tensor.narrow(self.axis, self.first, self.count)


@dataclass
class ExpertParts:
    """The int4 weights of a layer's experts on their device, and what has come of them."""

    weights: Mapping[str, ExpertWeights]
    """Of all experts, by matrix."""
    shards: Mapping[str, tuple[str, ...]]
    """What each matrix is made of, in the order of its rows: w1 and w3, or one alone."""
    waiting: dict[tuple[str, int], dict[str, QuantizedWeight]] = field(default_factory=dict)
    """By matrix and expert, the shards that are there while others are not."""
    done: set[tuple[str, int]] = field(default_factory=set)
    """By matrix and expert, what has been laid out."""

    @property
    def are_complete(self) -> bool:
        """Whether both matrices of every expert are laid out."""
        return len(self.done) == sum(weights.experts for weights in self.weights.values())

    def add(self, expert: int, shard: str, weight: QuantizedWeight) -> None:
        """Take in one shard of this rank's `expert`; lay the matrix out when it is complete."""
        matrix = matrix_of(shard)
        there = self.waiting.setdefault((matrix, expert), {})
        there[shard] = weight
        if len(there) == len(self.shards[matrix]):
            joined = join_rows([there[name] for name in self.shards[matrix]])
            self.weights[matrix].put(expert, joined)
            del self.waiting[matrix, expert]
            self.done.add((matrix, expert))

    def fill_with_dummies(self) -> None:
        """Make up any weights, the same for every expert."""
        for weights in self.weights.values():
            rows, columns = weights.shape
            device = weights.words.device
            groups = group_count(columns, weights.group_size, weights.group_offset)
            packed = torch.empty(((columns + 1) // 2, rows), dtype=torch.uint8, device=device)
            scale = torch.empty((groups, rows), dtype=torch.bfloat16, device=device)
            zero_point = torch.empty_like(scale)
            fill_with_dummies(packed, scale, zero_point)
            form = (weights.group_size, columns, weights.group_offset)
            weights.put(0, QuantizedWeight(packed, scale, zero_point, *form))
            weights.words[1:] = weights.words[0]
            weights.scales[1:] = weights.scales[0]
