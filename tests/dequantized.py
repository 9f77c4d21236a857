# SPDX-License-Identifier: Apache-2.0
"""What int4 weights stand for, by the number format's definition (docs/architecture.md)."""

import shutil

import torch
from safetensors.torch import load_file, save_file

from vllm_nanoquant.quantize.mse import quantize_mse

# Every module that preset `full` makes int4, by the last part of its name in the checkpoint.
FULL = {"in_proj", "out_proj", "up_proj", "down_proj", "gate_proj"}
FULL |= {"q_proj", "k_proj", "v_proj", "o_proj", "lm_head"}


def dequantized(weight, group_size=128):
    """Values, fp64 [N, K], of a weight [N, K] after quantization as it is done while loading.

    Integers, scales and zero points are the package's; what they stand for is (q + zero) * scale.
    """
    found = quantize_mse(weight, group_size)
    width = weight.shape[1] if group_size == -1 else group_size
    q = torch.stack([found.packed & 15, found.packed >> 4], 1).flatten(0, 1)[: weight.shape[1]]
    scale, zero = (
        each.double().repeat_interleave(width, 0)[: weight.shape[1]]
        for each in (found.scale, found.zero_point)
    )
    return ((q.double() + zero) * scale).t().contiguous()


def write_dequantized(source, target, dtype=torch.bfloat16):
    """A checkpoint whose weights have the values of int4 by preset `full`, rounded to `dtype`."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if name.removesuffix(".weight").rsplit(".", 1)[-1] in FULL:
            tensors[name] = dequantized(tensor).to(dtype)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target
