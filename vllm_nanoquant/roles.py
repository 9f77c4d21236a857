# SPDX-License-Identifier: Apache-2.0
"""What a module is for, read off its name, and what kind of layer each index is.

Presets speak of roles ("MLP", "attention"), never of one model's module names, so that the same
recipe means the same thing on every model that names its projections the usual way.
"""

import re
from collections.abc import Sequence
from enum import StrEnum
from typing import Any


class Role(StrEnum):
    """The part a quantizable projection plays in its layer."""

    MAMBA = "mamba"
    MLP = "mlp"
    ATTENTION = "attention"
    LM_HEAD = "lm_head"


class LayerKind(StrEnum):
    """The mixer of one layer of a hybrid model."""

    MAMBA = "mamba"
    ATTENTION = "attention"
    FEED_FORWARD = "feed_forward"


_ROLE_BY_LEAF = {
    "in_proj": Role.MAMBA,
    "out_proj": Role.MAMBA,
    "up_proj": Role.MLP,
    "down_proj": Role.MLP,
    "gate_proj": Role.MLP,
    "gate_up_proj": Role.MLP,
    "q_proj": Role.ATTENTION,
    "k_proj": Role.ATTENTION,
    "v_proj": Role.ATTENTION,
    "qkv_proj": Role.ATTENTION,
    "o_proj": Role.ATTENTION,
    "lm_head": Role.LM_HEAD,
}

# Letters of Nemotron-H's hybrid_override_pattern and the words of layers_block_type.
_KIND_BY_TOKEN = {
    "M": LayerKind.MAMBA,
    "*": LayerKind.ATTENTION,
    "-": LayerKind.FEED_FORWARD,
    "E": LayerKind.FEED_FORWARD,
    "mamba": LayerKind.MAMBA,
    "mamba2": LayerKind.MAMBA,
    "attention": LayerKind.ATTENTION,
    "mlp": LayerKind.FEED_FORWARD,
    "moe": LayerKind.FEED_FORWARD,
}

_LAYER_INDEX = re.compile(r"(?:^|\.)layers\.(\d+)(?:\.|$)")


def role_of(module: str) -> Role | None:
    """Role of a module by the last part of its name; None for what is never quantized."""
    return _ROLE_BY_LEAF.get(module.rsplit(".", 1)[-1])


def layer_index(module: str) -> int | None:
    """Index of the layer a module belongs to, or None for modules outside the layer stack."""
    found = _LAYER_INDEX.search(module)
    return int(found[1]) if found else None


def layer_kinds(hf_config: Any) -> tuple[LayerKind, ...] | None:
    """Kind of each layer from a Hugging Face model config.

    Reads ``hybrid_override_pattern`` (Nemotron-H, one letter a layer) or ``layers_block_type``
    (one word a layer). Returns None when the config has neither: the model is not a known hybrid.
    """
    tokens: Sequence[str] | None = getattr(hf_config, "hybrid_override_pattern", None)
    tokens = tokens or getattr(hf_config, "layers_block_type", None)
    if not tokens or any(token not in _KIND_BY_TOKEN for token in tokens):
        return None
    return tuple(_KIND_BY_TOKEN[token] for token in tokens)


def sensitive_layers(kinds: Sequence[LayerKind]) -> frozenset[int]:
    """Layers that preset ``quality`` leaves alone.

    The first and the last two layers, and the Mamba layer that feeds each attention layer, i.e.
    the nearest one before it (NVIDIA's selective recipe for Nemotron 3 Nano).
    """
    keep = {0, 1, len(kinds) - 2, len(kinds) - 1}
    last_mamba: int | None = None
    for index, kind in enumerate(kinds):
        if kind is LayerKind.MAMBA:
            last_mamba = index
        elif kind is LayerKind.ATTENTION and last_mamba is not None:
            keep.add(last_mamba)
    return frozenset(index for index in keep if index >= 0)
