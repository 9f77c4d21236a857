# SPDX-License-Identifier: Apache-2.0
"""`torch.ops.nanoquant.moe_w4a16`: a mixture of int4 experts as one custom op.

Few tokens go through `moe_decode`, which reads each chosen expert once, more through `moe_grouped`.
The choice is made inside the op, as in `ops.py`. Importing this module does not import Triton.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from vllm_nanoquant.kernels.experts import ExpertWeights
from vllm_nanoquant.kernels.moe_reference import ACTIVATIONS, moe_reference
from vllm_nanoquant.kernels.ops import ALIGNMENT, define_op, launching_on, require_one_device

SCHEMA = (
    "moe_w4a16(Tensor x, Tensor w13_words, Tensor w13_scales, Tensor w2_words, Tensor w2_scales, "
    "Tensor arrivals, Tensor topk_weights, Tensor topk_ids, Tensor? expert_map, int intermediate, "
    "str activation, int group_size, int w2_group_offset) -> Tensor"
)

# Pairs of a token and one of its experts up to which `moe_decode` is used.
DECODE_PAIRS = 512

# Tokens that `moe_grouped` takes at once; what lies between the products takes memory for each of
# their pairs.
GROUPED_TOKENS = 4096

_warm: set[tuple[object, ...]] = set()


def arrivals_needed(out_features: int) -> int:
    """Counters for experts whose second product has N rows: int32, zero between calls."""
    return -(-out_features // 16)


def decode_limit(top_k: int) -> int:
    """Most tokens that `moe_decode` takes."""
    return DECODE_PAIRS // top_k


class _Mixture(NamedTuple):
    """The op's arguments, the weights gathered and everything checked."""

    x: torch.Tensor
    w13: ExpertWeights
    w2: ExpertWeights
    arrivals: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    expert_map: torch.Tensor | None
    activation: str


def _mixture(
    x: torch.Tensor,
    w13_words: torch.Tensor,
    w13_scales: torch.Tensor,
    w2_words: torch.Tensor,
    w2_scales: torch.Tensor,
    arrivals: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    intermediate: int,
    activation: str,
    group_size: int,
    w2_group_offset: int,
) -> _Mixture:
    """Gather the arguments in the order of SCHEMA; ValueError unless they are of one layer."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    _check_routes(x, topk_weights, topk_ids, expert_map)
    rows = 2 * intermediate if ACTIVATIONS[activation] else intermediate
    hidden = x.shape[-1]
    w13 = ExpertWeights(w13_words, w13_scales, rows, hidden, group_size)
    w2 = ExpertWeights(w2_words, w2_scales, hidden, intermediate, group_size, w2_group_offset)
    if w13.experts != w2.experts:
        raise ValueError(f"w13 has {w13.experts} experts, w2 has {w2.experts}")
    if x.device != w13_words.device or x.device != w2_words.device:
        raise ValueError(f"x is on {x.device}, the weights on {w13_words.device}")
    if arrivals.numel() < arrivals_needed(hidden):
        raise ValueError(
            f"arrivals has {arrivals.numel()} counters; {arrivals_needed(hidden)} are needed"
        )
    return _Mixture(x, w13, w2, arrivals, topk_weights, topk_ids, expert_map, activation)


def _check_routes(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
) -> None:
    if x.dim() != 2 or topk_ids.dim() != 2 or topk_weights.shape != topk_ids.shape:
        raise ValueError(
            f"x {list(x.shape)} must be [M, H]; topk_weights {list(topk_weights.shape)} and "
            f"topk_ids {list(topk_ids.shape)} must be [M, top_k]"
        )
    if len(topk_ids) != len(x):
        raise ValueError(f"x has {len(x)} tokens, topk_ids has {len(topk_ids)}")
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"topk_ids is {topk_ids.dtype}; it must be torch.int32 or torch.int64")
    if expert_map is not None and expert_map.dtype != torch.int32:
        raise ValueError(f"expert_map is {expert_map.dtype}; it must be torch.int32")


def _cpu(*arguments: Any) -> torch.Tensor:
    mixture = _mixture(*arguments)
    return moe_reference(
        mixture.x,
        mixture.w13,
        mixture.w2,
        mixture.topk_weights,
        mixture.topk_ids,
        mixture.expert_map,
        mixture.activation,
    )


def _cuda(*arguments: Any) -> torch.Tensor:
    mixture = _mixture(*arguments)
    x = mixture.x
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"x is {x.dtype}; on a GPU it must be torch.bfloat16 or torch.float16")
    if len(x) == 0:
        return x.new_empty(x.shape)
    x = x.contiguous()
    if x.data_ptr() % ALIGNMENT:
        x = x.clone()
    weights, ids = mixture.topk_weights.float().contiguous(), mixture.topk_ids.int().contiguous()
    with launching_on(x.device):
        return _sum_of_experts(mixture._replace(x=x, topk_weights=weights, topk_ids=ids))


def _sum_of_experts(mixture: _Mixture) -> torch.Tensor:
    """The result for M >= 1 tokens, by the kernels for that number of tokens."""
    from vllm_nanoquant.kernels.moe_decode import moe_decode
    from vllm_nanoquant.kernels.moe_grouped import moe_grouped

    x, w13, w2, arrivals, weights, ids, expert_map, activation = mixture
    if len(x) <= decode_limit(ids.shape[1]):
        return moe_decode(x, w13, w2, arrivals, weights, ids, expert_map, activation)
    if len(x) <= GROUPED_TOKENS:
        return moe_grouped(x, w13, w2, weights, ids, expert_map, activation)
    y = torch.empty_like(x)
    for first in range(0, len(x), GROUPED_TOKENS):
        part = slice(first, first + GROUPED_TOKENS)
        # The last one may have so few tokens that only `moe_decode` was warmed up for them.
        y[part] = _sum_of_experts(
            mixture._replace(x=x[part], topk_weights=weights[part], topk_ids=ids[part])
        )
    return y


def _fake(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    require_one_device(x, *rest[:5])  # the weights and their counters
    return x.new_empty(x.shape)


define_op(SCHEMA, _cpu, _cuda, _fake)


def moe_w4a16(
    x: torch.Tensor,
    w13: ExpertWeights,
    w2: ExpertWeights,
    arrivals: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """Sum over each token's experts of weight * (activation(x @ W13.T) @ W2.T): [M, H].

    Arguments as in `moe_reference`; `arrivals` is int32 [arrivals_needed(H)] of zeros, and belongs
    to this layer alone. On a CPU x has any floating dtype and the reference runs; on a CUDA device
    x is bf16 or fp16, and the call may be captured in a CUDA graph after `warm_up_experts`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    return torch.ops.nanoquant.moe_w4a16(
        x,
        w13.words,
        w13.scales,
        w2.words,
        w2.scales,
        arrivals,
        topk_weights,
        topk_ids,
        expert_map,
        w2.in_features,
        activation,
        w2.group_size,
        w2.group_offset,
    )


def warm_up_experts(
    w13: ExpertWeights,
    w2: ExpertWeights,
    arrivals: torch.Tensor,
    activation: str,
    top_k: int,
    expert_map: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Compile and launch every kernel that these experts can need; on a CPU do nothing.

    Once per shape and process. Waits for the device first: the kernels load weights early.
    """
    device = w13.words.device
    if device.type != "cuda":
        return
    from vllm_nanoquant.kernels.moe_decode import decode_buckets
    from vllm_nanoquant.kernels.moe_grouped import grouped_buckets

    torch.cuda.synchronize(device)
    shapes = (w13.shape, w2.shape, w2.group_size, w2.group_offset, w2.experts)
    key = (device, shapes, activation, top_k, expert_map is None, dtype)
    if key in _warm:
        return
    buckets = grouped_buckets(w2.experts, top_k, device)
    for tokens in (*decode_buckets(top_k), *buckets):
        x = torch.zeros((tokens, w13.in_features), dtype=dtype, device=device)
        ids = torch.zeros((tokens, top_k), dtype=torch.int32, device=device)
        weights = torch.ones((tokens, top_k), device=device)
        moe_w4a16(x, w13, w2, arrivals, weights, ids, expert_map, activation)
    _warm.add(key)
