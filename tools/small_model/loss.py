# SPDX-License-Identifier: Apache-2.0
"""Losses from hidden states, a part of the tokens at a time: logits are never there whole."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_TOKENS = 16384
"""Tokens whose logits are there together: 1 GB in fp32 for 16384 words."""


def summed_loss(hidden: Tensor, head: Tensor, wanted: Tensor) -> Tensor:
    """Sum of -log p of the `wanted` tokens.

    Args:
        hidden: [..., K], what the LM head gets.
        head: its weight [N, K].
        wanted: token ids [...], as many as there are hidden states.

    Returns:
        One number, fp32.
    """
    total = torch.zeros((), device=hidden.device)
    parts = zip(
        hidden.flatten(0, -2).split(CHUNK_TOKENS), wanted.flatten().split(CHUNK_TOKENS), strict=True
    )
    for states, targets in parts:
        logits = F.linear(states, head)
        total = total + F.cross_entropy(logits.float(), targets, reduction="sum")
    return total
