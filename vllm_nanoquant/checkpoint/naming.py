# SPDX-License-Identifier: Apache-2.0
"""Names of files and tensors in our checkpoints, and the shapes that belong to them."""

import re
from collections.abc import Iterable

from vllm_nanoquant.quantize.groups import group_count

FORMAT_VERSION = 1
"""Version of the format on disk; in config.json it says that the weights are int4 already."""

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE_SHARD = "model.safetensors"
REPORT = "nanoquant_report.json"
JOURNAL = ".nanoquant_progress.jsonl"

WEIGHT = ".weight"
PACKED = ".weight_packed"
SCALE = ".weight_scale"
ZERO_POINT = ".weight_zero_point"
ORDER = ".weight_order"
QUANTIZED_SUFFIXES = (PACKED, SCALE, ZERO_POINT, ORDER)

_ROUTED_EXPERT = re.compile(r"\.experts\.(?:\d+\.|[^.]+$)")
_ONE_EXPERT = re.compile(r"^(.+\.experts)\.\d+\.[^.]+$")


def shard_names(count: int) -> list[str]:
    """Names of `count` shards; a single one needs no index."""
    if count == 1:
        return [SINGLE_SHARD]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def quantized_layout(
    rows: int, columns: int, group_size: int
) -> dict[str, tuple[str, tuple[int, int]]]:
    """Safetensors dtype and shape of the tensors that stand for W [rows, columns], by suffix."""
    groups = group_count(columns, group_size)
    return {
        SCALE: ("BF16", (groups, rows)),
        ZERO_POINT: ("BF16", (groups, rows)),
        PACKED: ("U8", ((columns + 1) // 2, rows)),
    }


def modules_with_weights(tensors: Iterable[str]) -> list[str]:
    """Modules that have a weight, dense or int4, in the order of their names' first appearance."""
    found: dict[str, None] = {}
    for name in tensors:
        for suffix in (WEIGHT, PACKED):
            if name.endswith(suffix):
                found[name.removesuffix(suffix)] = None
    return list(found)


def is_routed_expert(module: str) -> bool:
    """Whether a module is one expert of a mixture, or all of them in one tensor."""
    return _ROUTED_EXPERT.search(module) is not None


def mixture_of(module: str) -> str | None:
    """Name of the mixture that a module is one expert's projection of; None for anything else."""
    found = _ONE_EXPERT.match(module)
    return found[1] if found else None
