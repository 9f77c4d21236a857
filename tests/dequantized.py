# SPDX-License-Identifier: Apache-2.0
"""The number format by its definition (docs/architecture.md), independent of the package."""

import shutil

import torch
from safetensors.torch import load_file, save_file

# Every module that preset `full` makes int4, by the last part of its name in the checkpoint.
FULL = {"in_proj", "out_proj", "up_proj", "down_proj", "gate_proj"}
FULL |= {"q_proj", "k_proj", "v_proj", "o_proj", "lm_head"}


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


def write_dequantized(source, target, dtype=torch.bfloat16):
    """A checkpoint whose weights have the values of int4 by preset `full`, rounded to `dtype`."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if name.removesuffix(".weight").rsplit(".", 1)[-1] in FULL:
            tensors[name] = dequantized(tensor).to(dtype)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target
