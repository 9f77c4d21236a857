# SPDX-License-Identifier: Apache-2.0
"""How far a product is from the float64 product of the same weights."""

from __future__ import annotations

import torch

# Rows of x multiplied at a time: the temporaries of a wide layer stay under 1 GB each.
CHUNK_TOKENS = 512
# BF16's own rounding of the result is 1.4e-3. Beyond this a result is not inexact but wrong.
MOST_ERROR = 0.02


def relative_error(y: torch.Tensor, x: torch.Tensor, exact: torch.Tensor) -> float:
    """Mean |y - expected| / mean |expected| with expected = x @ exact.T in fp64.

    NaN or infinite when any value of y is.

    Args:
        y: [M, N], any float dtype.
        x: [M, K], any float dtype.
        exact: fp64 [N, K].
    """
    distance = torch.zeros((), dtype=torch.float64, device=x.device)
    magnitude = torch.zeros_like(distance)
    for start in range(0, x.shape[0], CHUNK_TOKENS):
        rows = slice(start, start + CHUNK_TOKENS)
        expected = x[rows].double() @ exact.t()
        magnitude += expected.abs().sum()
        distance += expected.sub_(y[rows]).abs_().sum()
    return float(distance / magnitude)


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
