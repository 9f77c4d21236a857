# SPDX-License-Identifier: Apache-2.0
"""Sizes of the small model: NVIDIA-Nemotron-Nano-9B-v2's proportions at a hundredth of its size."""

from __future__ import annotations

from tiny_model.model import TinyConfig

SMALL = TinyConfig(
    vocab_size=16384,
    hidden_size=640,  # 5 groups of 128; the 9B: 35
    # The 9B's own first 23 layers and a like end: 13 Mamba, 12 MLP, 2 attention (27, 25, 4 there).
    pattern="M-M-M-MM-M-M-M*-M-M-M*-M-M-",
    intermediate_size=2240,  # 3.5 times hidden and 17.5 groups of 128, as 15680 is 122.5
    mamba_num_heads=16,
    mamba_head_dim=80,
    n_groups=2,
    ssm_state_size=128,
    num_attention_heads=10,  # 5 of them for each of keys and values, as in the 9B
    num_key_value_heads=2,
    head_dim=64,
)
"""94 million parameters, in_proj [3088, 640]."""

MINIATURE = TinyConfig(
    vocab_size=512,
    hidden_size=80,
    pattern="M-M*-M-",
    intermediate_size=144,
    mamba_num_heads=4,
    mamba_head_dim=40,
    n_groups=2,
    ssm_state_size=16,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
"""To try the commands with on a CPU."""

GEOMETRIES = {"small": SMALL, "miniature": MINIATURE}
