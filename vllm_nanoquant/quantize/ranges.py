# SPDX-License-Identifier: Apache-2.0
"""What every quantizer shares: checks of a weight, and the min-max formula for a group's range."""

from __future__ import annotations

import torch

from vllm_nanoquant.quantize.groups import GROUP_SIZES

STEPS = 15
"""Steps between the lowest and the highest of the 16 integers."""

# Weights looked at together when a message is put together: 16 MB in fp32.
_CHUNK_WEIGHTS = 1 << 22


def validate_weight(weight: torch.Tensor, group_size: int) -> None:
    """Raise ValueError unless `weight` is a non-empty [N, K] in bf16, fp16 or fp32.

    An unknown group size is refused as well. Values are not looked at.
    """
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"expected a non-empty weight [N, K], got shape {list(weight.shape)}")
    if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"expected a weight in bf16, fp16 or fp32, got {weight.dtype}")
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size is {group_size}; it must be one of {GROUP_SIZES}")


def scale_and_zero_point(
    low: torch.Tensor, high: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point, bf16, of groups with the ranges low <= 0 <= high (fp32, any shape).

    `scale = (high - low) / 15` and `zero_point = low / scale`, each rounded to bf16. Where the
    scale rounds to 0, it is 1 and the zero point 0. The same bytes on every device.
    """
    # Divide by a tensor: CUDA turns a division by a Python number into a multiplication by its
    # reciprocal, which rounds differently from the CPU.
    steps = torch.full((), STEPS, dtype=torch.float32, device=low.device)
    scale = ((high - low) / steps).to(torch.bfloat16)
    empty = scale == 0
    scale.masked_fill_(empty, 1.0)
    # + 0.0 turns -0.0 into 0.0: which of the two a minimum over both returns is not defined.
    zero_point = (low / scale.float()).masked_fill_(empty, 0.0).to(torch.bfloat16).add_(0.0)
    return scale, zero_point


def require_finite(weight: torch.Tensor, scale: torch.Tensor) -> None:
    """Raise ValueError if the min-max scale [G, N] of a weight [N, K] is not finite somewhere.

    A NaN or an infinity anywhere in a group makes its scale NaN or infinite. The message counts the
    weights that are not finite and names the first row.
    """
    if bool(torch.isfinite(scale).all()):
        return
    chunk = max(1, _CHUNK_WEIGHTS // weight.shape[1])
    bad = torch.cat([(~torch.isfinite(part)).sum(dim=1) for part in weight.split(chunk)])
    if not bool(bad.any()):
        row = int((~torch.isfinite(scale)).any(dim=0).nonzero()[0])
        raise ValueError(f"the range of a group in row {row} (max - min) is beyond fp32")
    row = int(bad.nonzero()[0])
    raise ValueError(
        f"{int(bad.sum())} weights are not finite (NaN or infinite); the first is in row {row}"
    )
