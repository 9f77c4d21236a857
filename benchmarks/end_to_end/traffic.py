# SPDX-License-Identifier: Apache-2.0
"""Say how much of a decode step is reading memory, and how much is everything else.

    python benchmarks/end_to_end/traffic.py benchmarks/geometry/nemotron-3-nano-30b-a3b \
        --preset balanced --tokens-per-second 499

Counts what one token at batch 1 has to read: the weights of its layers, of the experts that it
chooses, of the LM head, and the states of the Mamba layers, which are written back too. That over
the bandwidth of the memory is the time that no kernel can save; the rest of the step is launches,
latencies, small kernels and bandwidth that was not reached. The KV cache of a short context and
activations are not counted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from types import SimpleNamespace

from vllm_nanoquant.planner.shapes import shapes_by_config
from vllm_nanoquant.recipe import Recipe
from vllm_nanoquant.roles import layer_kinds

H200_BYTES_PER_SECOND = 4.8e12
BF16_BYTES = 2
STATE_BYTES = 4  # float32, vLLM's default for these models
EXPERTS = ".experts."


def int4_bytes(weights: int, group_size: int) -> float:
    """Half a byte per weight, and two bf16 numbers per group."""
    return weights * (0.5 + 2 * BF16_BYTES / group_size)


def bytes_per_token(config: dict[str, Any], preset: str) -> dict[str, float]:
    """Bytes that one token reads (and writes, of states), by part of the model.

    Args:
        config: the model's config.json, of a Nemotron-H.
        preset: of the recipe, or "bf16".
    """
    recipe = None if preset == "bf16" else Recipe.parse({"preset": preset})
    kinds = layer_kinds(SimpleNamespace(**config))
    share = config.get("num_experts_per_tok", 0) / (config.get("n_routed_experts") or 1)
    parts = {"experts": 0.0, "other int4": 0.0, "other BF16": 0.0}
    for name, shape in shapes_by_config(config).items():
        if "embeddings" in name:
            continue
        module = name.removesuffix(".weight")
        weights = 1
        for size in shape:
            weights *= size
        scheme = recipe.scheme(module, kinds) if recipe and len(shape) == 2 else None
        nbytes = int4_bytes(weights, scheme.group_size) if scheme else weights * BF16_BYTES
        if EXPERTS in name:
            parts["experts"] += nbytes * share
        else:
            parts["other int4" if scheme else "other BF16"] += nbytes
    states = config["mamba_num_heads"] * config["mamba_head_dim"] * config["ssm_state_size"]
    mamba_layers = config["hybrid_override_pattern"].count("M")
    parts["Mamba states"] = 2 * STATE_BYTES * states * mamba_layers
    return parts


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("geometry", type=Path, help="folder with config.json")
    parser.add_argument("--preset", default="balanced", help="of the recipe, or bf16")
    parser.add_argument("--tokens-per-second", type=float, required=True, help="at batch 1")
    parser.add_argument("--bandwidth", type=float, default=H200_BYTES_PER_SECOND, help="bytes/s")
    options = parser.parse_args(arguments)
    config = json.loads((options.geometry / "config.json").read_text(encoding="utf-8"))
    parts = bytes_per_token(config, options.preset)
    step = 1e3 / options.tokens_per_second
    memory = 1e3 * sum(parts.values()) / options.bandwidth
    for part, nbytes in parts.items():
        print(f"{part:14} {nbytes / 1e6:8.0f} MB")
    print(f"{'together':14} {sum(parts.values()) / 1e6:8.0f} MB, {memory:.2f} ms of {step:.2f} ms")
    print(f"not memory traffic: {step - memory:.2f} ms, {100 * (1 - memory / step):.0f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
