# SPDX-License-Identifier: Apache-2.0
"""Triton: which programs of `moe_decode` work for which pairs of a token and one of its experts.

Up to 8 pairs of the same expert share the columns of a matrix instruction, so that the expert is
read once. There are programs for every pair; those of a pair work for the pairs of its expert that
follow, or have nothing to do because those of an earlier pair work for it:

    pair               0   1   2   3   4   5          (2 tokens, 3 experts each)
    expert             7   2   5   2   7   9
    earlier, same      0   0   0   1   1   0          a multiple of 8: works
    works for         0,4 1,3  2   -   -   5

The plan is int32 [pairs, 16]: the expert or -1, how many pairs, six words of nothing, the pairs.
The pairs of one token have different experts, so one token needs no plan.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_nanoquant.kernels.layout import ceil_div
from vllm_nanoquant.kernels.moe import DECODE_PAIRS
from vllm_nanoquant.kernels.overlap import wait_for_kernel_before
from vllm_nanoquant.kernels.settings import launch_options

# Words of the plan of one pair, and where the list of pairs begins among them.
PLAN_WORDS = tl.constexpr(16)
FIRST_MEMBER = tl.constexpr(8)

# Pairs that one program plans.
PLANNED = 16

# Lengths of the list of pairs that the kernel is compiled for; the last is the longest.
PAIR_SIZES = (16, 64, DECODE_PAIRS)


@triton.jit
def local_experts(
    ids_ptr: tl.tensor, map_ptr: tl.tensor, pair: tl.tensor, pairs: int, HAS_MAP: tl.constexpr
) -> tl.tensor:
    """This rank's number of the expert of each pair; -1 where there is none."""
    expert = tl.load(ids_ptr + pair, mask=pair < pairs, other=-1)
    if HAS_MAP:
        expert = tl.load(map_ptr + expert, mask=expert >= 0, other=-1)
    return expert


@triton.jit(do_not_specialize=["pairs"])
def plan_kernel(
    ids_ptr: tl.tensor,
    map_ptr: tl.tensor,
    plan_ptr: tl.tensor,
    pairs: int,
    PAIRS: tl.constexpr,
    PLANNED: tl.constexpr,
    HAS_MAP: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Write the plan of `pairs` <= PAIRS pairs."""
    if PDL:
        wait_for_kernel_before()
    every = tl.arange(0, PAIRS)
    own = tl.program_id(0) * PLANNED + tl.arange(0, PLANNED)
    experts = local_experts(ids_ptr, map_ptr, every, pairs, HAS_MAP)
    expert = local_experts(ids_ptr, map_ptr, own, pairs, HAS_MAP)
    same = ((expert[:, None] == experts[None, :]) & (every < pairs)[None, :]).to(tl.int32)
    rank = tl.sum(tl.where(every[None, :] < own[:, None], same, 0), axis=1)
    first = rank // 8 * 8
    ranks = tl.cumsum(same, axis=1) - 1
    worker = tl.where((same > 0) & (ranks == first[:, None]), every[None, :], 0)
    worker = tl.sum(worker, axis=1)
    count = tl.minimum(tl.sum(same, axis=1) - first, 8)
    exists = own < pairs
    plan = plan_ptr + own * PLAN_WORDS
    tl.store(plan, tl.where(rank == first, expert, -1), mask=exists)
    tl.store(plan + 1, count, mask=exists)
    member = plan_ptr + worker * PLAN_WORDS + FIRST_MEMBER + rank - first
    tl.store(member, own, mask=exists & (expert >= 0))


@triton.jit
def read_plan(
    ids_ptr: tl.tensor,
    map_ptr: tl.tensor,
    plan_ptr: tl.tensor,
    pair: tl.tensor,
    HAS_MAP: tl.constexpr,
    ONE_TOKEN: tl.constexpr,
) -> tl.tensor:
    """(expert, pairs [8], how many) that the programs of a pair work for; expert -1: for none."""
    column = tl.arange(0, 8)
    if ONE_TOKEN:
        expert = tl.load(ids_ptr + pair)
        if HAS_MAP:
            expert = tl.load(map_ptr + expert, mask=expert >= 0, other=-1)
        return expert, pair + column * 0, column < 1
    else:
        plan = plan_ptr + pair * PLAN_WORDS
        count = tl.load(plan + 1)
        exists = column < count
        members = tl.load(plan + FIRST_MEMBER + column, mask=exists, other=0)
        return tl.load(plan), members, exists


def plan_pairs(topk_ids: torch.Tensor, expert_map: torch.Tensor | None) -> torch.Tensor:
    """Plan of topk_ids, int32 [M, top_k]: int32 [pairs, 16]; at most PAIR_SIZES[-1] pairs."""
    pairs = topk_ids.numel()
    plan = torch.empty((pairs, PLAN_WORDS.value), dtype=torch.int32, device=topk_ids.device)
    plan_kernel[(ceil_div(pairs, PLANNED),)](
        topk_ids,
        expert_map,
        plan,
        pairs,
        PAIRS=next(size for size in PAIR_SIZES if size >= pairs),
        PLANNED=PLANNED,
        HAS_MAP=expert_map is not None,
        **launch_options(topk_ids.device, num_warps=4, num_stages=1),
    )
    return plan
