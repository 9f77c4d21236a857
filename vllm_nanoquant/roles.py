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

# Names that mean this under these parents only. Granite's routed experts have an input_linear too.
_ROLE_BY_PARENT = {
    **dict.fromkeys(
        (
            f"{attention}.{leaf}"
            for attention in ("attn", "self_attn", "attention", "self_attention")
            for leaf in ("out_proj", "dense")
        ),
        Role.ATTENTION,
    ),
    "shared_mlp.input_linear": Role.MLP,
    "shared_mlp.output_linear": Role.MLP,
}
# Zamba2 projects the output of a shared transformer block by a module of the layer itself.
_SHARED_BLOCK_OUTPUT = re.compile(r"(?:^|\.)layers\.\d+\.linear$")

# Letters of Nemotron-H's hybrid_override_pattern, and the words of layers_block_type and of
# layer_types; transformers 5 has its own words. A hybrid layer is Zamba2's: a transformer block,
# and then a Mamba mixer, which the block feeds and not the other way round.
_KIND_BY_TOKEN = {
    "M": LayerKind.MAMBA,
    "*": LayerKind.ATTENTION,
    "-": LayerKind.FEED_FORWARD,
    "E": LayerKind.FEED_FORWARD,
    "mamba": LayerKind.MAMBA,
    "mamba2": LayerKind.MAMBA,
    "linear_attention": LayerKind.MAMBA,
    "attention": LayerKind.ATTENTION,
    "full_attention": LayerKind.ATTENTION,
    "sliding_attention": LayerKind.ATTENTION,
    "hybrid": LayerKind.ATTENTION,
    "mlp": LayerKind.FEED_FORWARD,
    "moe": LayerKind.FEED_FORWARD,
}

LAYER_KEYS = ("hybrid_override_pattern", "layers_block_type", "layer_types")
"""Keys of a model config that give one letter or word for each layer; the first one there holds."""

# One expert of a mixture, as Mixtral and others name its projections.
_EXPERT = re.compile(r"\.experts\.\d+\.w[123]$")
_LAYER_INDEX = re.compile(r"(?:^|\.)layers\.(\d+)(?:\.|$)")


def role_of(module: str) -> Role | None:
    """Role of a module by the last two parts of its name; None for what is never quantized."""
    parts = module.rsplit(".", 2)
    role = _ROLE_BY_PARENT.get(".".join(parts[-2:])) or _ROLE_BY_LEAF.get(parts[-1])
    if role is not None:
        return role
    if _SHARED_BLOCK_OUTPUT.search(module):
        return Role.ATTENTION
    return Role.MLP if _EXPERT.search(module) else None


def layer_index(module: str) -> int | None:
    """Index of the layer a module belongs to, or None for modules outside the layer stack."""
    found = _LAYER_INDEX.search(module)
    return int(found[1]) if found else None


def layer_kinds(hf_config: Any) -> tuple[LayerKind, ...] | None:
    """Kind of each layer from a Hugging Face model config.

    Reads ``hybrid_override_pattern`` (Nemotron-H, one letter a layer), ``layers_block_type`` or
    ``layer_types`` (one word a layer), or ``attn_layer_indices`` (Bamba). Returns None where these
    tell no Mamba layers from others: a plain transformer, or one whose every layer is both, as
    Falcon-H1.
    """
    tokens: Sequence[str] | None = None
    for name in LAYER_KEYS:
        tokens = tokens or getattr(hf_config, name, None)
    attention = getattr(hf_config, "attn_layer_indices", None)
    if not tokens and attention is not None:
        count = getattr(hf_config, "num_hidden_layers", None) or 0
        tokens = ["attention" if index in attention else "mamba" for index in range(count)]
    if not tokens or any(token not in _KIND_BY_TOKEN for token in tokens):
        return None
    kinds = tuple(_KIND_BY_TOKEN[token] for token in tokens)
    return kinds if LayerKind.MAMBA in kinds else None


def sensitive_layers(kinds: Sequence[LayerKind]) -> frozenset[int]:
    """Layers that preset ``quality`` leaves alone: the Mamba layers that feed an attention layer.

    The nearest Mamba layer before each attention layer feeds it (NVIDIA's selective recipe for
    Nemotron 3 Nano, which also keeps the attention layers, as presets but ``full`` do).
    """
    keep: set[int] = set()
    last_mamba: int | None = None
    for index, kind in enumerate(kinds):
        if kind is LayerKind.MAMBA:
            last_mamba = index
        elif kind is LayerKind.ATTENTION and last_mamba is not None:
            keep.add(last_mamba)
    return frozenset(keep)
