# SPDX-License-Identifier: Apache-2.0
"""Random mixtures of int4 experts and their fp64 solution, for every test of their kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tests.kernels.problem import random_weight
from vllm_nanoquant.kernels.experts import ExpertWeights
from vllm_nanoquant.kernels.moe import arrivals_needed
from vllm_nanoquant.kernels.reference import dequantize
from vllm_nanoquant.quantize.groups import QuantizedWeight

GATED = {"silu": F.silu, "gelu": F.gelu}


@dataclass
class MoeProblem:
    """One mixture: x [M, H], per expert W13 [I or 2I, H] and W2 [H, I], routes [M, top_k]."""

    x: torch.Tensor
    w13: list[QuantizedWeight]
    w2: list[QuantizedWeight]
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    expert_map: torch.Tensor | None
    activation: str

    def stacked(self) -> tuple[ExpertWeights, ExpertWeights]:
        """The weights as the kernels take them."""
        return _stack(self.w13, self.x.device), _stack(self.w2, self.x.device)

    def arrivals(self) -> torch.Tensor:
        """Counters of a layer."""
        count = arrivals_needed(self.x.shape[1])
        return torch.zeros(count, dtype=torch.int32, device=self.x.device)

    def expected(self) -> torch.Tensor:
        """The sum over each token's experts in fp64, one pair at a time."""
        y = torch.zeros(self.x.shape, dtype=torch.float64, device=self.x.device)
        w13 = [dequantize(weight, torch.float64) for weight in self.w13]
        w2 = [dequantize(weight, torch.float64) for weight in self.w2]
        ids, weights = self.topk_ids.tolist(), self.topk_weights.double()
        numbers = None if self.expert_map is None else self.expert_map.tolist()
        for token, chosen in enumerate(ids):
            for slot, expert in enumerate(chosen):
                own = expert if numbers is None or expert < 0 else numbers[expert]
                if own >= 0:
                    h = self._activate(w13[own] @ self.x[token].double())
                    y[token] += weights[token, slot] * (w2[own] @ h)
        return y

    def _activate(self, h: torch.Tensor) -> torch.Tensor:
        if self.activation == "relu2_no_mul":
            return h.clamp(min=0) ** 2
        gate, up = h.chunk(2)
        return GATED[self.activation](gate) * up


def _stack(weights: list[QuantizedWeight], device: torch.device) -> ExpertWeights:
    first = weights[0]
    stacked = ExpertWeights.empty(
        len(weights), *first.shape, first.group_size, first.group_offset, device
    )
    for expert, weight in enumerate(weights):
        stacked.put(expert, weight)
    return stacked


def random_moe(
    tokens: int,
    hidden: int,
    intermediate: int,
    experts: int,
    top_k: int,
    group_size: int = 128,
    w2_offset: int = 0,
    *,
    activation: str = "relu2_no_mul",
    expert_map: list[int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    popular: bool = False,
) -> MoeProblem:
    """A problem from the global random state; no token chooses an expert twice.

    Args:
        tokens: M.
        hidden: H.
        intermediate: I.
        experts: experts of this rank.
        top_k: experts per token.
        group_size: of both weights.
        w2_offset: group offset of W2.
        activation: as `moe_reference` takes it.
        expert_map: this rank's number of each of the model's experts, or -1.
        dtype: of x.
        device: of all tensors.
        popular: all tokens choose the same experts.
    """
    rows = intermediate if activation == "relu2_no_mul" else 2 * intermediate
    total = experts if expert_map is None else len(expert_map)
    w13 = [random_weight(rows, hidden, group_size, 0, device) for _ in range(experts)]
    w2 = [
        random_weight(hidden, intermediate, group_size, w2_offset, device) for _ in range(experts)
    ]
    chosen = [torch.randperm(total)[:top_k] for _ in range(tokens)]
    ids = torch.stack([chosen[0].flip(0) if popular else each for each in chosen])
    return MoeProblem(
        x=(torch.randn(tokens, hidden, device=device) / hidden**0.5).to(dtype),
        w13=w13,
        w2=w2,
        topk_weights=torch.rand(tokens, top_k, device=device) + 0.1,
        topk_ids=ids.to(device=device, dtype=torch.int32),
        expert_map=None
        if expert_map is None
        else torch.tensor(expert_map, dtype=torch.int32, device=device),
        activation=activation,
    )
