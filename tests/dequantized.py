# SPDX-License-Identifier: Apache-2.0
"""The number format by its definition (docs/architecture.md), independent of the package."""

import torch


def dequantized(weight, group_size=128):
    """Values, fp64 [N, K], of a weight [N, K] after min-max quantization to int4."""
    parts = []
    for group in weight.split(weight.shape[1] if group_size == -1 else group_size, dim=1):
        group = group.float()
        low = group.amin(1, keepdim=True).clamp(max=0)
        high = group.amax(1, keepdim=True).clamp(min=0)
        scale = ((high - low) / torch.tensor(15.0)).to(torch.bfloat16).float()
        scale[scale == 0] = 1
        zero = (low / scale).to(torch.bfloat16).float()
        q = (group / scale - zero).round().clamp(0, 15)
        parts.append((q.double() + zero.double()) * scale.double())
    return torch.cat(parts, dim=1)
