# SPDX-License-Identifier: Apache-2.0
"""What run.py can compare: BF16, our presets, and vLLM's own ways to smaller weights."""

from __future__ import annotations

from typing import Any, get_args

from vllm_nanoquant.recipe import METHOD, Preset

# vLLM's kernels for groups of 128 refuse rows that are no multiple of 128, such as the 9B's.
GROUP = 64
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": GROUP,
            },
        }
    },
}
PEERS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8": {"quantization": "fp8"},
    "int4-vllm": {"hf_overrides": {"quantization_config": COMPRESSED}},
    "int4-marlin": {"hf_overrides": {"quantization_config": COMPRESSED}},
}
"""Arguments of ``LLM`` by name; `int4-vllm` has the kernels that vLLM chooses."""
_ENVIRONMENT = {"int4-marlin": {"VLLM_DISABLED_KERNELS": "MacheteLinearKernel"}}
NAMES = (*PEERS, *get_args(Preset))


def engine_options(name: str, max_capture_size: int | None) -> dict[str, Any]:
    """Arguments of ``LLM`` that make an engine the contestant `name`.

    Args:
        name: one of NAMES.
        max_capture_size: cap on the sizes of CUDA graphs, for our presets; None for the default.
    """
    if name in PEERS:
        return PEERS[name]
    recipe: dict[str, Any] = {"preset": name}
    if max_capture_size:
        recipe["max_capture_size"] = max_capture_size
    return {"quantization": METHOD, "hf_overrides": {"quantization_config": recipe}}


def environment(name: str) -> dict[str, str]:
    """Environment variables of the contestant's process, beside the usual ones."""
    return _ENVIRONMENT.get(name, {})
