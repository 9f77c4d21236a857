# SPDX-License-Identifier: Apache-2.0
"""What one GPU holds of a model: weights by a recipe, and what is left for sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm_nanoquant.checkpoint.errors import UsageError
from vllm_nanoquant.checkpoint.stored import read_modules
from vllm_nanoquant.inventory import parse_options
from vllm_nanoquant.planner.cache import KV_BYTES, SSM_BYTES, Cache, cache_of
from vllm_nanoquant.planner.errors import PlanError
from vllm_nanoquant.planner.memory import Needs, needs_of
from vllm_nanoquant.planner.mixers import Attention, Mamba, attention_of, mamba_of
from vllm_nanoquant.planner.numbers import count_of
from vllm_nanoquant.planner.settings import Settings
from vllm_nanoquant.planner.source import Facts
from vllm_nanoquant.planner.speed import Traffic, traffic_of
from vllm_nanoquant.planner.weights import Part, Weight, weights_of
from vllm_nanoquant.recipe import Recipe, Scheme, ServingOptions

RESERVE_SHARE = 0.01
"""Share of the memory that limits leave free, for what a plan cannot know."""
SHORTEST = 4096
"""Tokens that each sequence is to have before more of them are suggested."""


_EXPERT_COUNTS = ("n_routed_experts", "num_local_experts", "num_experts")


@dataclass(frozen=True)
class Limits:
    """Limits that a server can be started with.

    Attributes:
        max_model_len: tokens of one sequence.
        max_num_seqs: sequences at once.
        gpu_memory_utilization: share of the memory that vLLM may use.
    """

    max_model_len: int
    max_num_seqs: int
    gpu_memory_utilization: float


@dataclass(frozen=True)
class Fit:
    """What one GPU holds by one recipe.

    Attributes:
        settings: how the model is to be served.
        weights: of one rank.
        schemes: of the modules that are int4, by name.
        needs: bytes beside the cache.
        cache: the cache's blocks.
        traffic: what a decode step reads.
        model_len: tokens that the model can have.
        captured: largest batch with a CUDA graph.
    """

    settings: Settings
    weights: Sequence[Weight]
    schemes: Mapping[str, Scheme]
    needs: Needs
    cache: Cache
    traffic: Traffic
    model_len: int
    captured: int

    @property
    def cache_bytes(self) -> int:
        """Bytes that vLLM has left for its cache; below zero if it has none."""
        return self.settings.budget - self.needs.total

    @property
    def reserve(self) -> int:
        """Bytes that limits leave free."""
        return int(RESERVE_SHARE * self.settings.budget)

    @property
    def blocks(self) -> int:
        """Blocks that limits count on."""
        return self.cache.blocks_in(max(0, self.cache_bytes - self.reserve))

    def longest(self, sequences: int) -> int:
        """Tokens that each of so many sequences can have at once; 0 for none."""
        return self.cache.longest(self.blocks, sequences, self.model_len)

    def sequences(self, length: int) -> int:
        """Sequences of so many tokens that fit at once."""
        return self.cache.sequences(self.blocks, length)

    def limits(self) -> Limits | None:
        """Limits within which no sequence ever waits for memory; None where there are none."""
        settings = self.settings
        count = settings.max_num_seqs
        if count is None:
            wanted = settings.max_model_len or min(SHORTEST, self.model_len)
            count = max(1, min(self.captured, self.sequences(wanted)))
        longest = self.longest(count)
        if longest < (settings.max_model_len or 1):
            return None
        return Limits(settings.max_model_len or longest, count, settings.gpu_memory_utilization)


def fit(facts: Facts, recipe: Recipe | None, settings: Settings) -> Fit:
    """Find out what one GPU holds.

    Args:
        facts: the model.
        recipe: which modules become int4; None for none. A checkpoint that is int4 already is taken
            as it is.
        settings: how it is to be served.

    Raises:
        PlanError, RecipeError: the model or the recipe cannot be planned.
    """
    ranks = settings.ranks
    mamba = mamba_of(facts)
    attention = attention_of(facts)
    _require_divisible(mamba, attention, ranks.count)
    weights = weights_of(facts, mamba, ranks)
    schemes = schemes_of(facts, weights, recipe)
    top_k, experts = _experts(facts, weights)
    cache = _cache(facts, attention, mamba, settings)
    most = count_of(facts.config, "max_position_embeddings", default=settings.max_model_len or 4096)
    layers = count_of(facts.config, "num_hidden_layers", default=len(facts.kinds or ()) or 1)
    return Fit(
        settings=settings,
        weights=weights,
        schemes=schemes,
        needs=needs_of(weights, schemes, mamba, settings.tokens, ranks.count, top_k),
        cache=cache,
        traffic=traffic_of(weights, schemes, cache.state_bytes, layers, top_k / experts),
        model_len=max(most, settings.max_model_len or 0),
        captured=recipe.max_capture_size if isinstance(recipe, ServingOptions) else 8,
    )


def _experts(facts: Facts, weights: Sequence[Weight]) -> tuple[int, int]:
    """Experts that a token chooses, and experts of a layer; 0 of 1 where there are none."""
    if all(weight.part is not Part.EXPERTS for weight in weights):
        return 0, 1
    top_k = count_of(facts.config, "num_experts_per_tok", "num_experts_per_token")
    return top_k, max(top_k, count_of(facts.config, *_EXPERT_COUNTS))


def _require_divisible(mamba: Mamba | None, attention: Attention | None, ranks: int) -> None:
    """Refuse numbers of ranks that vLLM refuses.

    Raises:
        UsageError: heads or groups do not divide.
    """
    if ranks == 1:
        return
    counts = {}
    if mamba is not None:
        counts["Mamba heads"] = mamba.heads
        if mamba.groups > 1:
            counts["Mamba groups"] = mamba.groups
    if attention is not None:
        counts["attention heads"] = attention.heads
        if attention.kv_heads >= ranks:
            counts["heads of keys and values"] = attention.kv_heads
    for name, count in counts.items():
        if count % ranks:
            raise UsageError(f"tensor_parallel_size {ranks} does not divide {count} {name}")


def schemes_of(
    facts: Facts, weights: Sequence[Weight], recipe: Recipe | None
) -> Mapping[str, Scheme]:
    """Scheme of each module that is served in int4, by name.

    Raises:
        RecipeError: as `Recipe.scheme`, or a checkpoint that contradicts its recipe.
    """
    found: dict[str, Scheme | None] = {}
    if facts.is_int4:
        own = parse_options(facts.whole_config["quantization_config"]).options
        for name in read_modules(facts.tensors, own, facts.kinds, facts.keeps_lm_head):
            found[name] = own.scheme(name, facts.kinds)
    elif recipe is not None:
        recipe.check_against({weight.module for weight in weights})
        for weight in weights:
            kept = weight.part is Part.LM_HEAD and facts.keeps_lm_head
            if kept or weight.part in (Part.OTHER, Part.EMBEDDING):
                continue
            # Experts that lie in one tensor are served one by one.
            name = f"{weight.module}.experts.0.up_proj" if weight.is_fused else weight.module
            found[weight.module] = recipe.scheme(name, facts.kinds)
    return {name: scheme for name, scheme in found.items() if scheme}


def _cache(
    facts: Facts, attention: Attention | None, mamba: Mamba | None, settings: Settings
) -> Cache:
    return cache_of(
        attention,
        mamba,
        settings.ranks.count,
        KV_BYTES[settings.kv_cache_dtype],
        SSM_BYTES[ssm_dtype(facts, settings.mamba_ssm_cache_dtype)],
        settings.caching,
        count_of(facts.config, "chunk_size", "mamba_chunk_size", default=128),
    )


def ssm_dtype(facts: Facts, given: str) -> str:
    """Dtype of the recurrent state as vLLM takes it: Nemotron-H's is float32 unless it says other.

    Raises:
        PlanError: config.json names one that is not known.
    """
    if given != "auto":
        return given
    if facts.config.get("model_type") != "nemotron_h":
        return "bfloat16"
    dtype = facts.config.get("mamba_ssm_cache_dtype", "float32")
    if not isinstance(dtype, str) or dtype not in SSM_BYTES:
        raise PlanError(f"config.json: mamba_ssm_cache_dtype is none of {', '.join(SSM_BYTES)}")
    return dtype
