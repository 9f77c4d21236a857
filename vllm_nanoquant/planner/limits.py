# SPDX-License-Identifier: Apache-2.0
"""Limits for a server, and what to say where there are none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from vllm_nanoquant.checkpoint.errors import CheckpointError, printable
from vllm_nanoquant.planner.errors import PlanError
from vllm_nanoquant.planner.fit import RESERVE_SHARE, Fit, Limits, fit
from vllm_nanoquant.planner.numbers import GIB, gib
from vllm_nanoquant.planner.settings import UTILIZATION, Settings, memory_for
from vllm_nanoquant.planner.source import Facts, read_facts
from vllm_nanoquant.planner.weights import Ranks
from vllm_nanoquant.recipe import Recipe, RecipeError

_SMALLER_PRESETS = ("balanced", "full")
_RANKS = (2, 4, 8)


def suggest_limits(
    model: str | Path,
    recipe: Recipe,
    *,
    gpu_memory: int,
    tensor_parallel_size: int = 1,
    gpu_memory_utilization: float = UTILIZATION,
    max_model_len: int | None = None,
    max_num_seqs: int | None = None,
    kv_cache_dtype: str = "auto",
    mamba_ssm_cache_dtype: str = "float32",
) -> Limits:
    """Largest safe limits of a model on GPUs of `gpu_memory` bytes each; what is given is kept.

    Within them every sequence can be of full length at once. Where neither limit is given, there
    are as many sequences as batches with a CUDA graph have at most, of equal length.

    Args:
        model: directory or repository id; only config.json and safetensors headers are read.
        recipe: which modules become int4; a checkpoint that is int4 already is taken as it is.
        gpu_memory: bytes of each GPU, as ``nvidia-smi`` tells them.
        tensor_parallel_size: GPUs that share the model.
        gpu_memory_utilization: share of the memory that vLLM may use.
        max_model_len: tokens of one sequence.
        max_num_seqs: sequences at once.
        kv_cache_dtype: of keys and values.
        mamba_ssm_cache_dtype: of the recurrent state; "auto" as vLLM takes it.

    Raises:
        PlanError: it cannot fit; the text names the smallest thing that would.
        UsageError: the model cannot be found.
        CheckpointError, RecipeError: it or the recipe cannot be used.
    """
    settings = Settings(
        gpu_memory=gpu_memory,
        ranks=Ranks(tensor_parallel_size),
        gpu_memory_utilization=gpu_memory_utilization,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        kv_cache_dtype=kv_cache_dtype,
        mamba_ssm_cache_dtype=mamba_ssm_cache_dtype,
    )
    facts = read_facts(model)
    found = fit(facts, recipe, settings)
    limits = found.limits()
    if limits is None:
        raise PlanError(why_not(facts, recipe, found))
    return limits


def why_not(facts: Facts, recipe: Recipe | None, found: Fit) -> str:
    """By how much a model does not fit, and what would.

    Args:
        facts: the model.
        recipe: as it was planned with.
        found: what came of it.
    """
    settings = found.settings
    length, count = settings.max_model_len or 1, settings.max_num_seqs or 1
    missing = _wanted(found) - settings.budget
    cache = _least_cache(found)
    text = (
        f"{printable(facts.name)} does not fit: {gib(found.needs.total)} beside the cache and "
        f"{gib(cache)} for {count} x {length} tokens are {gib(missing)} more than the "
        f"{gib(settings.budget)} of each GPU that vLLM may use"
    )
    return f"{text}; what would fit: {', or '.join(_ways_out(facts, recipe, found))}"


def _wanted(found: Fit) -> int:
    """Bytes of a GPU that vLLM would have to be given."""
    return int((found.needs.total + _least_cache(found)) / (1 - RESERVE_SHARE)) + 1


def _least_cache(found: Fit) -> int:
    """Bytes of a cache for the sequences that were asked for, or for one of one token."""
    length, count = found.settings.max_model_len or 1, found.settings.max_num_seqs or 1
    return (found.cache.blocks_of(length) * count + 1) * found.cache.block_bytes


def _ways_out(facts: Facts, recipe: Recipe | None, found: Fit) -> Iterator[str]:
    """Single changes after which it would fit; the last always does."""
    settings = found.settings
    if settings.max_num_seqs and (fewer := found.sequences(settings.max_model_len or 1)):
        yield f"--max-num-seqs {fewer}"
    if settings.max_model_len and (shorter := found.longest(settings.max_num_seqs or 1)):
        yield f"--max-model-len {shorter}"
    if not facts.is_int4:
        for preset in _SMALLER_PRESETS:
            smaller = (
                Recipe(preset=preset)
                if recipe is None
                else recipe.model_copy(update={"preset": preset})
            )
            if _fits(facts, smaller, settings):
                yield f"--preset {preset}"
                break
    for count in _RANKS:
        if count > settings.ranks.count and _fits(
            facts, recipe, replace(settings, ranks=replace(settings.ranks, count=count))
        ):
            yield f"--tensor-parallel-size {count}"
            break
    needed = memory_for(_wanted(found), settings.gpu_memory_utilization)
    yield f"GPUs of {-(-needed // (GIB // 10)) / 10:.1f} GiB"


def _fits(facts: Facts, recipe: Recipe | None, settings: Settings) -> bool:
    try:
        return fit(facts, recipe, settings).limits() is not None
    except (CheckpointError, RecipeError):  # as where heads do not divide by the ranks
        return False
