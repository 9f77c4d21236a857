# SPDX-License-Identifier: Apache-2.0
"""What makes a wrong product show: a limit of its error, and memory full of NaN."""

from __future__ import annotations

import torch

# BF16's own rounding of the result is 1.4e-3. Beyond this a result is not inexact but wrong.
MOST_ERROR = 0.02


def poison(x: torch.Tensor, n: int) -> None:
    """Leave NaN in the memory that the allocator hands out next.

    A kernel that does not write all of its result, or that adds to memory it did not clear, then
    gives NaN and not the right values of an earlier call.

    Args:
        x: [M, K], as the call to be checked takes it.
        n: columns of that call's result, which has x's dtype.
    """
    blocks = [torch.full((x.shape[0], n), torch.nan, dtype=x.dtype, device=x.device)]
    # Workspaces of any size: the allocator keeps small and large blocks apart.
    blocks += [torch.full((1 << size,), torch.nan, device=x.device) for size in (8, 12, 16, 24)]
    del blocks
