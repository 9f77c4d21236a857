# SPDX-License-Identifier: Apache-2.0
"""Contestants of `moe.py`: ours, and vLLM's mixtures of experts in bf16 and in int4.

Each takes dense experts and gives a call of x [M, H], top-k weights and ids; and the weights that
it multiplies by, in fp64, for the check of its result. Squared ReLU between the products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.kernels.peers.base import importable
from benchmarks.kernels.peers.symmetric import Symmetric, pack_eight, quantize_symmetric
from vllm_nanoquant.kernels.experts import ExpertWeights
from vllm_nanoquant.kernels.moe import arrivals_needed, moe_w4a16
from vllm_nanoquant.kernels.reference import dequantize
from vllm_nanoquant.quantize.groups import QuantizedWeight
from vllm_nanoquant.quantize.minmax import quantize_minmax

GROUP_SIZE = 128
# The largest that divides both 2688 and 1856, which vLLM's kernels ask for.
PEER_GROUP_SIZE = 64
ACTIVATION = "relu2_no_mul"

Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Exact = Callable[[int], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Experts:
    """Dense experts, bf16: w13 [E, I, H] and w2 [E, H, I]."""

    w13: torch.Tensor
    w2: torch.Tensor


@dataclass(frozen=True)
class Contestant:
    """A mixture as one contestant computes it.

    Attributes:
        call: of x bf16 [M, H], top-k weights fp32 [M, top_k] and ids int32: bf16 [M, H].
        exact: W13 [I, H] and W2 [H, I] of one expert, in fp64, as the contestant has them.
        group_size: columns per scale; None for bf16.
        nbytes: bytes of all experts.
    """

    call: Call
    exact: Exact
    group_size: int | None
    nbytes: int


def ours(experts: Experts) -> Contestant:
    """Take `moe_w4a16`, groups of 128."""

    def stack(dense: torch.Tensor) -> tuple[ExpertWeights, list[QuantizedWeight]]:
        quantized = [quantize_minmax(weight, GROUP_SIZE) for weight in dense]
        experts, n, k = dense.shape
        stacked = ExpertWeights.empty(experts, n, k, GROUP_SIZE, 0, dense.device)
        for index, weight in enumerate(quantized):
            stacked.put(index, weight)
        return stacked, quantized

    w13, exact_13 = stack(experts.w13)
    w2, exact_2 = stack(experts.w2)
    arrivals = torch.zeros(
        arrivals_needed(w2.out_features), dtype=torch.int32, device=w2.words.device
    )

    def call(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return moe_w4a16(x, w13, w2, arrivals, weights, ids, None, ACTIVATION)

    def exact(expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        w13_e, w2_e = exact_13[expert], exact_2[expert]
        return dequantize(w13_e, torch.float64), dequantize(w2_e, torch.float64)

    return Contestant(call, exact, GROUP_SIZE, w13.nbytes + w2.nbytes)


def bf16(experts: Experts) -> Contestant:
    """Take vLLM's Triton kernels on the dense experts."""
    fused = importable("vllm.model_executor.layers.fused_moe.fused_moe")
    activation = _activation()

    def call(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return fused.fused_experts(x, experts.w13, experts.w2, weights, ids, activation=activation)

    def exact(expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        return experts.w13[expert].double(), experts.w2[expert].double()

    return Contestant(call, exact, None, experts.w13.nbytes + experts.w2.nbytes)


def triton_int4(experts: Experts) -> Contestant:
    """Take vLLM's Triton kernels on int4, W = (q - 8) * scale."""
    fused = importable("vllm.model_executor.layers.fused_moe.fused_moe")
    config = importable("vllm.model_executor.layers.fused_moe.config")
    w13, w2 = _symmetric(experts.w13), _symmetric(experts.w2)
    packed = [torch.stack([_pack_two(each.integers) for each in part]) for part in (w13, w2)]
    scales = [torch.stack([each.scale for each in part]) for part in (w13, w2)]
    quant_config = config.int4_w4a16_moe_quant_config(
        w1_scale=scales[0], w2_scale=scales[1], block_shape=[0, PEER_GROUP_SIZE]
    )
    activation = _activation()

    def call(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return fused.fused_experts(
            x, *packed, weights, ids, activation=activation, quant_config=quant_config
        )

    return _int4(call, w13, w2, [*packed, *scales])


def marlin(experts: Experts) -> Contestant:
    """Take vLLM's Marlin kernels on int4, W = (q - 8) * scale."""
    ops = importable("vllm._custom_ops")
    module = importable("vllm.model_executor.layers.fused_moe.experts.marlin_moe")
    utils = importable("vllm.model_executor.layers.quantization.utils.marlin_utils")
    scalar_types = importable("vllm.scalar_type").scalar_types
    activation = _activation()

    def pack(part: list[Symmetric]) -> tuple[torch.Tensor, torch.Tensor]:
        n, k = part[0].shape
        # Marlin repacks int32 [K / 8, N], eight neighbours of K to a word.
        words = torch.stack([pack_eight(each.integers).t().contiguous() for each in part])
        none = torch.empty((len(part), 0), dtype=torch.int32, device=words.device)
        scale = torch.stack([each.scale.t().contiguous() for each in part])
        return (
            ops.gptq_marlin_moe_repack(words, none, k, n, 4),
            utils.marlin_moe_permute_scales(scale, k, n, PEER_GROUP_SIZE),
        )

    w13, w2 = _symmetric(experts.w13), _symmetric(experts.w2)
    (words_13, scale_13), (words_2, scale_2) = pack(w13), pack(w2)

    def call(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return module.fused_marlin_moe(
            x,
            words_13,
            words_2,
            None,
            None,
            scale_13,
            scale_2,
            weights,
            ids,
            quant_type_id=scalar_types.uint4b8.id,
            activation=activation,
        )

    return _int4(call, w13, w2, [words_13, words_2, scale_13, scale_2])


CONTESTANTS: dict[str, Callable[[Experts], Contestant]] = {
    "ours": ours,
    "bf16": bf16,
    "marlin": marlin,
    "triton_int4": triton_int4,
}


def _activation() -> object:
    found = importable("vllm.model_executor.layers.fused_moe.activation").MoEActivation
    return found.from_str(ACTIVATION)


def _symmetric(dense: torch.Tensor) -> list[Symmetric]:
    return [quantize_symmetric(weight, PEER_GROUP_SIZE) for weight in dense]


def _pack_two(integers: torch.Tensor) -> torch.Tensor:
    """uint8 [N, K], values 0 to 15, two to a byte along K, the first in the low bits."""
    return integers[:, 0::2] | (integers[:, 1::2] << 4)


def _int4(
    call: Call, w13: list[Symmetric], w2: list[Symmetric], tensors: list[torch.Tensor]
) -> Contestant:
    def exact(expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        return w13[expert].exact(), w2[expert].exact()

    return Contestant(call, exact, PEER_GROUP_SIZE, sum(tensor.nbytes for tensor in tensors))
