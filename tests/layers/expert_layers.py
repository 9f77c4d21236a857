# SPDX-License-Identifier: Apache-2.0
"""A layer of routed experts of real vLLM, as one rank of several sees it, and its loading."""

import contextlib
import dataclasses

import pytest
import torch
from vllm.config import LoadConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe import config as moe_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager

from tests.checkpoints import int4_tensors
from tests.layers.fake_ranks import random_weight
from tests.layers.stored_layers import headers_of
from vllm_nanoquant.config import NanoquantConfig
from vllm_nanoquant.inventory import Inventory
from vllm_nanoquant.kernels.layout import to_quantized
from vllm_nanoquant.recipe import ServingOptions

PREFIX = "model.layers.1.mixer.experts"
EXPERTS = 8
HIDDEN = 200
TOP_K = 2
NON_GATED = {"w1": "up_proj", "w2": "down_proj"}
GATED = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


class AnyPlatform:
    """vLLM refuses experts without a gate on a CPU; our op has a form for it."""

    def __getattr__(self, name):
        return lambda *args: name == "is_cuda_alike"


@dataclasses.dataclass
class Rank:
    """Which rank of how many, and how experts are spread over them."""

    rank: int = 0
    size: int = 1
    whole_experts: bool = False

    @property
    def parallel(self):
        """vLLM's description: with whole experts, none of them is split."""
        tp, ep = (1, self.size) if self.whole_experts else (self.size, 1)
        return moe_config.FusedMoEParallelConfig(
            tp_size=tp,
            tp_rank=self.rank % tp,
            ep_size=ep,
            ep_rank=self.rank % ep,
            use_ep=self.whole_experts,
            pcp_size=1,
            dp_size=1,
            pcp_rank=0,
            dp_rank=0,
            sp_size=1,
            all2all_backend="allgather_reducescatter",
            enable_eplb=False,
        )


RANKS = [
    *(Rank(*rank) for rank in [(0, 1), (0, 2), (1, 2), (1, 4), (3, 4), (5, 8)]),
    *(Rank(*rank, True) for rank in [(0, 2), (1, 2), (1, 4), (3, 4), (5, 8)]),
]


def names_of(gated):
    return GATED if gated else NON_GATED


def make_layer(config, intermediate, gated=False, rank=None, load_format="auto", **rest):
    """Experts of real vLLM on the meta device."""
    parallel = (rank or Rank()).parallel
    activation = MoEActivation.SILU if gated else MoEActivation.RELU2_NO_MUL
    manager = ExpertMapManager(
        max_num_batched_tokens=64,
        top_k=TOP_K,
        global_num_experts=EXPERTS,
        num_redundant_experts=0,
        num_expert_group=1,
        moe_parallel_config=parallel,
        placement_strategy="linear",
        enable_eplb=False,
    )
    names = names_of(gated)
    with (
        on_any_platform(),
        set_current_vllm_config(VllmConfig(load_config=LoadConfig(load_format=load_format))),
    ):
        described = moe_config.FusedMoEConfig(
            num_experts=EXPERTS,
            experts_per_token=TOP_K,
            hidden_dim=HIDDEN,
            intermediate_size=intermediate,
            num_local_experts=manager.local_num_experts,
            num_logical_experts=EXPERTS,
            activation=rest.pop("activation", activation),
            device="cpu",
            routing_method=moe_config.RoutingMethodType.Default,
            moe_parallel_config=parallel,
            in_dtype=torch.bfloat16,
            **rest.pop("described", {}),
        )
        return RoutedExperts(
            PREFIX,
            torch.bfloat16,
            described,
            config,
            manager,
            ckpt_gate_proj_name=names["w1"],
            ckpt_down_proj_name=names["w2"],
            ckpt_up_proj_name=names.get("w3"),
            **rest,
        )


@contextlib.contextmanager
def on_any_platform():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe_config, "current_platform", AnyPlatform())
        yield


def config_of(stored=None, **options):
    options = ServingOptions(**options)
    return NanoquantConfig(Inventory(options, None if stored is None else headers_of(stored)))


def random_experts(intermediate, gated=False):
    """BF16 tensors of a checkpoint's experts, by name."""
    found = {}
    for expert in range(EXPERTS):
        for index, (shard, leaf) in enumerate(names_of(gated).items()):
            shape = (HIDDEN, intermediate) if shard == "w2" else (intermediate, HIDDEN)
            name = f"{PREFIX}.{expert}.{leaf}.weight"
            found[name] = random_weight(*shape, seed=10 * expert + index)
    return found


def int4_experts(dense, group_size):
    """The tensors of an int4 checkpoint of the same experts."""
    stored = {}
    for name, weight in dense.items():
        stored |= int4_tensors(name.removesuffix(".weight"), weight, group_size)
    return stored


def load(layer, tensors):
    """Hand the experts a checkpoint's tensors, as vLLM's models do."""
    prefix = f"{PREFIX.rpartition('.')[0]}.experts."
    return list(layer.load_weights((n.removeprefix(prefix), t) for n, t in tensors.items()))


def expert_weights(layer, matrix):
    """The int4 weights of a layer that has been processed."""
    from vllm_nanoquant.kernels.experts import ExpertWeights

    method = layer.quant_method
    rows, columns, offset = HIDDEN, method.intermediate, method.group_offset
    if matrix == "w13":
        rows, columns, offset = len(method.shards["w13"]) * columns, HIDDEN, 0
    return ExpertWeights(
        getattr(layer, f"{matrix}_weight_packed").data,
        getattr(layer, f"{matrix}_weight_scale").data,
        rows,
        columns,
        method.scheme.group_size,
        offset,
    )


def quantized_expert(layer, matrix, expert):
    return to_quantized(expert_weights(layer, matrix).expert(expert))
