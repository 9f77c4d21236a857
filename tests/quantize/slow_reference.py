# SPDX-License-Identifier: Apache-2.0
"""The number format written a second time, in numpy and with loops, for the tests to compare with.

It shares no code with the package: its own bf16 rounding, its own grouping, its own packing.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def round_to_bf16(value: np.float32) -> np.float32:
    """Nearest bf16, ties to even, by arithmetic on the bits of a finite fp32 number."""
    bits = int(np.asarray(value, dtype=np.float32).view(np.uint32))
    low = bits & 0xFFFF
    bits >>= 16
    if low > 0x8000 or (low == 0x8000 and bits & 1):
        bits += 1
    return np.asarray(bits << 16, dtype=np.uint32).view(np.float32)[()]


def quantize(weight: Floats, group_size: int) -> tuple[Bytes, Floats, Floats]:
    """(q [N, K], scale [G, N], zero point [G, N]) of a weight [N, K], one group at a time."""
    rows, columns = weight.shape
    starts = range(0, columns, group_size)
    q = np.zeros((rows, columns), dtype=np.uint8)
    scale = np.ones((len(starts), rows), dtype=np.float32)
    zero_point = np.zeros((len(starts), rows), dtype=np.float32)
    for n in range(rows):
        for g, start in enumerate(starts):
            group = weight[n, start : start + group_size]
            low = min(np.float32(0), *group)
            high = max(np.float32(0), *group)
            s = round_to_bf16((high - low) / np.float32(15))
            if s == 0:
                continue
            z = round_to_bf16(low / s)
            scale[g, n], zero_point[g, n] = s, z
            for i, w in enumerate(group):
                q[n, start + i] = int(min(max(np.round(w / s - z), 0), 15))
    return q, scale, zero_point


def dequantize(q: Bytes, scale: Floats, zero_point: Floats, group_size: int) -> npt.NDArray:
    """(q + zero_point) * scale in fp64, [N, K]."""
    w = np.zeros(q.shape, dtype=np.float64)
    for k in range(q.shape[1]):
        g = k // group_size
        w[:, k] = (q[:, k] + zero_point[g].astype(np.float64)) * scale[g].astype(np.float64)
    return w


def pack(q: Bytes) -> Bytes:
    """[N, K] integers to [ceil(K / 2), N] bytes, low nibble first."""
    packed = np.zeros(((q.shape[1] + 1) // 2, q.shape[0]), dtype=np.uint8)
    for k in range(q.shape[1]):
        packed[k // 2] |= q[:, k] << (4 * (k % 2))
    return packed
