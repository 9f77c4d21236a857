# SPDX-License-Identifier: Apache-2.0
"""A mixture of int4 experts in plain torch: the oracle for its kernels, and what a CPU runs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from vllm_nanoquant.kernels.experts import ExpertWeights
from vllm_nanoquant.kernels.reference import w4a16_reference


def _silu(h: torch.Tensor) -> torch.Tensor:
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def _gelu(h: torch.Tensor) -> torch.Tensor:
    gate, up = h.chunk(2, dim=-1)
    return F.gelu(gate) * up


def _relu2_no_mul(h: torch.Tensor) -> torch.Tensor:
    return F.relu(h).square()


_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": _silu,
    "gelu": _gelu,
    "relu2_no_mul": _relu2_no_mul,
}

ACTIVATIONS: dict[str, bool] = {"silu": True, "gelu": True, "relu2_no_mul": False}
"""Activations between the two products, by vLLM's names; True where the first product has 2I rows,
I of the gate and I to be multiplied with it."""


def activate(h: torch.Tensor, activation: str) -> torch.Tensor:
    """Activation of h [M, I or 2I]: [M, I] in h's dtype, computed in fp32."""
    return _FUNCTIONS[activation](h.float()).to(h.dtype)


def local_experts(topk_ids: torch.Tensor, expert_map: torch.Tensor | None) -> torch.Tensor:
    """This rank's number of each chosen expert; -1 for those of other ranks, and for -1.

    A router may choose -1 for tokens that only pad a batch.
    """
    if expert_map is None:
        return topk_ids
    return torch.where(topk_ids < 0, -1, expert_map[topk_ids.clamp(min=0).long()])


def moe_reference(
    x: torch.Tensor,
    w13: ExpertWeights,
    w2: ExpertWeights,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """Sum over a token's experts e of weight * (activation(x @ W13_e.T) @ W2_e.T).

    Args:
        x: [M, H].
        w13: E weights [I or 2I, H].
        w2: E weights [H, I].
        topk_weights: fp32 [M, top_k].
        topk_ids: integers [M, top_k], numbers of experts in the whole model, -1 for none.
        expert_map: int32 [experts of the model], this rank's number of each or -1; None where it
            has them all.
        activation: one of `ACTIVATIONS`.

    Returns:
        [M, H] in x's dtype, summed in fp32.
    """
    local = local_experts(topk_ids, expert_map)
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in local.unique().tolist():
        if expert < 0:
            continue
        token, slot = (local == expert).nonzero(as_tuple=True)
        h = activate(w4a16_reference(x[token], w13.expert(expert), None), activation)
        part = w4a16_reference(h, w2.expert(expert), None).float()
        y.index_add_(0, token, part * topk_weights[token, slot].float()[:, None])
    return y.to(x.dtype)
