# SPDX-License-Identifier: Apache-2.0
"""The plan of a model by several recipes, as rows and figures to print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

from vllm_nanoquant.planner.fit import Fit, Limits, fit
from vllm_nanoquant.planner.limits import why_not
from vllm_nanoquant.planner.memory import served_bytes
from vllm_nanoquant.planner.settings import Settings
from vllm_nanoquant.planner.source import Facts
from vllm_nanoquant.planner.speed import GPUS
from vllm_nanoquant.planner.weights import Part
from vllm_nanoquant.recipe import METHOD, Preset, Recipe, RecipeError

BATCHES = (1, 8)
"""Batches that speed is predicted for."""
SEQUENCES = (1, 2, 4, 8, 16, 32)
"""Numbers of sequences that the longest context is told for."""
AS_IT_IS = "as it is"
BF16 = "bf16"


@dataclass
class Row:
    """A part of the model.

    Attributes:
        part: its name.
        modules: number of matrices, or of tensors that are none.
        parameters: of the whole model.
        bf16_bytes: on one GPU, in bfloat16.
        bytes: on one GPU, as it is served.
        read_bytes: of these for one token at batch 1; states are read and written.
    """

    part: str
    modules: int = 0
    parameters: int = 0
    bf16_bytes: int = 0
    bytes: int = 0
    read_bytes: int = 0


@dataclass(frozen=True)
class Variant:
    """The plan by one recipe.

    Attributes:
        name: of the preset, or "bf16" or "as it is".
        recipe: in words; empty for bf16.
        found: what one GPU holds.
        rows: parts, and the sum.
        limits: to serve with; None where it does not fit.
        why: it does not fit; empty where it does.
    """

    name: str
    recipe: str
    found: Fit
    rows: Sequence[Row]
    limits: Limits | None
    why: str

    @property
    def speeds(self) -> Mapping[str, Mapping[int, float]]:
        """Predicted tokens per second by GPU and batch."""
        ranks = self.found.settings.ranks.count
        traffic = self.found.traffic
        return {
            gpu.name: {batch: traffic.tokens_per_second(gpu, batch, ranks) for batch in BATCHES}
            for gpu in GPUS
        }

    def as_json(self) -> dict[str, Any]:
        """Plain data of it all."""
        found, cache = self.found, self.found.cache
        needs = found.needs
        return {
            "name": self.name,
            "recipe": self.recipe,
            "parts": [asdict(row) for row in self.rows],
            "gpu": {
                **asdict(needs),
                "model": needs.model,
                "beside_cache": needs.total,
                "budget": found.settings.budget,
                "cache": max(0, found.cache_bytes),
            },
            "cache": {
                "bytes_per_token": cache.token_bytes,
                "state_bytes_per_sequence": cache.state_bytes,
                "block_tokens": cache.block_tokens,
                "block_bytes": cache.block_bytes,
                "blocks": cache.blocks_in(max(0, found.cache_bytes)) + (found.cache_bytes > 0),
                "blocks_per_sequence_without_tokens": (cache.states or 0) * cache.mamba_groups,
            },
            "limits": asdict(self.limits) if self.limits else None,
            "why_not": self.why or None,
            "longest_by_sequences": {count: found.longest(count) for count in SEQUENCES},
            "sequences_at_full_length": found.sequences(found.model_len),
            "predicted_tokens_per_second": self.speeds,
        }


def variants_of(
    facts: Facts, recipes: Mapping[str, Recipe | None], settings: Settings
) -> tuple[list[Variant], dict[str, str]]:
    """Plan a model by each recipe.

    Returns:
        The plans, and for those that cannot be made the reason, by name.

    Raises:
        CheckpointError: the model cannot be planned.
        RecipeError: it cannot be by any of the recipes.
    """
    found, reasons = [], {}
    for name, recipe in recipes.items():
        try:
            found.append(_variant(facts, name, recipe, settings))
        except RecipeError as error:
            reasons[name] = str(error).removeprefix(f"{METHOD}: ")
            if all(name in reasons for name, each in recipes.items() if each is not None):
                raise
    return found, reasons


def recipes_of(facts: Facts, recipe: Recipe, preset: str | None) -> dict[str, Recipe | None]:
    """Recipes to plan by: the one asked for, or BF16 and every preset.

    Args:
        facts: the model; one that is int4 already has no choice.
        recipe: options besides the preset.
        preset: the one asked for; None for all.
    """
    if facts.is_int4:
        return {AS_IT_IS: None}
    if preset is not None:
        return {preset: recipe}
    presets = get_args(Preset)
    return {BF16: None} | {name: recipe.model_copy(update={"preset": name}) for name in presets}


def _variant(facts: Facts, name: str, recipe: Recipe | None, settings: Settings) -> Variant:
    found = fit(facts, recipe, settings)
    if recipe is not None and not found.schemes:
        raise RecipeError(f"{METHOD}: {recipe.in_words} covers no module of {facts.name}")
    limits = found.limits()
    return Variant(
        name=name,
        recipe=recipe.in_words if recipe else "",
        found=found,
        rows=_rows(found),
        limits=limits,
        why="" if limits else why_not(facts, recipe, found),
    )


def _rows(found: Fit) -> list[Row]:
    rows = {part: Row(str(part)) for part in Part}
    tied = all(weight.part is not Part.LM_HEAD for weight in found.weights)
    for weight in found.weights:
        row = rows[weight.part]
        nbytes = served_bytes(weight, found.schemes.get(weight.module))
        row.modules += 1
        row.parameters += weight.whole
        row.bf16_bytes += weight.bf16_bytes
        row.bytes += nbytes
        if weight.part is not Part.EMBEDDING or tied:
            row.read_bytes += nbytes
    experts = rows[Part.EXPERTS]
    experts.read_bytes = round(experts.read_bytes * found.traffic.choice)
    kept = [row for row in rows.values() if row.modules]
    if found.traffic.state:
        kept.append(Row("Mamba states", read_bytes=2 * found.traffic.state))
    total = Row("total")
    for row in kept:
        total.modules += row.modules
        total.parameters += row.parameters
        total.bf16_bytes += row.bf16_bytes
        total.bytes += row.bytes
        total.read_bytes += row.read_bytes
    return [*kept, total]
