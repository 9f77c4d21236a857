# SPDX-License-Identifier: Apache-2.0
"""Speed beside quality: what each preset costs on the small model, and gains on the 9B."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.evidence.tables import Results, change, header, line
from vllm_nanoquant.planner.fit import fit
from vllm_nanoquant.planner.settings import Settings
from vllm_nanoquant.planner.source import read_facts
from vllm_nanoquant.planner.speed import known_gpu
from vllm_nanoquant.recipe import Recipe

GEOMETRY = Path(__file__).resolve().parents[1] / "geometry" / "nemotron-nano-9b-v2"
CONSUMER = "RTX 3090"
BATCHES = (1, 8)
_PRESETS = ("ssm", "quality", "balanced", "full")
_NOTHING = "-"


def rows(results: Results, contest: dict[str, Any]) -> Iterator[str]:
    """One line for BF16 and each preset that was served.

    Args:
        results: of benchmarks/evidence/run.py.
        contest: a report of benchmarks/end_to_end/run.py on the 9B's geometry.
    """
    measured = [f"{contest['device'].removeprefix('NVIDIA ')}, batch {size}" for size in BATCHES]
    expected = [f"{CONSUMER}, batch {size}, predicted" for size in BATCHES]
    yield from header("weights", "`mse`", "`gptq`", "9B, GiB", *measured, *expected)
    for preset in ("bf16", *_PRESETS):
        served = contest["results"].get(preset, {"error": "not run"})
        if "error" in served:
            continue
        rates = served["decode_tokens_per_second"]
        yield line(
            "BF16" if preset == "bf16" else f"`{preset}`",
            *(_cost(results, preset, method) for method in ("mse", "gptq")),
            f"{served['weights_gib']:.2f}",
            *(f"{rates[str(size)]['median']:.0f}" for size in BATCHES),
            *(f"{predicted(preset, size):.0f}" for size in BATCHES),
        )


def predicted(preset: str, batch: int) -> float:
    """Tokens per second that the planner expects of the 9B on the consumer GPU."""
    gpu = known_gpu(CONSUMER)
    recipe = None if preset == "bf16" else Recipe.parse({"preset": preset})
    found = fit(read_facts(GEOMETRY), recipe, Settings(gpu_memory=gpu.memory))
    return found.traffic.tokens_per_second(gpu, batch)


def _cost(results: Results, preset: str, method: str) -> str:
    row = results.get(f"{preset}-g128-{method}")
    return change(row) if row else _NOTHING
