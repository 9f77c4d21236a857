# SPDX-License-Identifier: Apache-2.0
"""How far a result is from another, and a product from the float64 product of its weights."""

from __future__ import annotations

import torch

# Rows of x multiplied at a time: the temporaries of a wide layer stay under 1 GB each.
_CHUNK_TOKENS = 512


def mean_relative_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    """Mean |y - expected| / mean |expected|, of one shape; NaN where any value of y is."""
    return float((y - expected).abs().mean() / expected.abs().mean())


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
    for start in range(0, x.shape[0], _CHUNK_TOKENS):
        rows = slice(start, start + _CHUNK_TOKENS)
        expected = x[rows].double() @ exact.t()
        magnitude += expected.abs().sum()
        distance += expected.sub_(y[rows]).abs_().sum()
    return float(distance / magnitude)
