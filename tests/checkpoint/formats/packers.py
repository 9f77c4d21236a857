# SPDX-License-Identifier: Apache-2.0
"""Foreign layouts written bit by bit, and our own read back so: oracles for the readers.

Loops over single integers, so that nothing is shared with the code under test. `q` is a nested list
[N][K], `zero` [G][N], both from 0 to 15.
"""

import random

import torch

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


class Int4:
    """An int4 weight by its numbers: w[n][k] = (q[n][k] - zero[g][n]) * scale[g][n]."""

    def __init__(self, rows, columns, group, *, seed=0, symmetric=False, scattered=False,
                 dtype=torch.bfloat16, zeros=(0, 15)):  # fmt: skip
        rng = random.Random(seed)
        self.rows, self.columns = rows, columns
        self.width = columns if group == -1 else group
        self.groups = -(-columns // self.width)
        self.q = [[rng.randrange(16) for _ in range(columns)] for _ in range(rows)]
        self.zero = [
            [8 if symmetric else rng.randint(*zeros) for _ in range(rows)]
            for _ in range(self.groups)
        ]
        self.scale = torch.tensor(
            [[rng.uniform(0.01, 2.0) for _ in range(rows)] for _ in range(self.groups)]
        ).to(dtype)
        self.g_idx = [k // self.width for k in range(columns)]
        if scattered:
            rng.shuffle(self.g_idx)

    def values(self):
        """Dense weight, float64 [N, K], with the scales in bf16."""
        scale = self.scale.to(torch.bfloat16).double().tolist()
        return torch.tensor(
            [
                [
                    (self.q[n][k] - self.zero[self.g_idx[k]][n]) * scale[self.g_idx[k]][n]
                    for k in range(self.columns)
                ]
                for n in range(self.rows)
            ],
            dtype=torch.float64,
        )


def _word(numbers):
    """Eight integers, the first in the lowest bits, as a signed 32-bit number."""
    word = 0
    for place, number in enumerate(numbers):
        word |= number << (4 * place)
    return word - (1 << 32) if word >= 1 << 31 else word


def _eights(numbers):
    padded = list(numbers) + [0] * (-len(numbers) % 8)
    return [padded[i : i + 8] for i in range(0, len(padded), 8)]


def _words(lines):
    return torch.tensor([[_word(part) for part in _eights(line)] for line in lines]).int()


def _turned(matrix):
    return [list(line) for line in zip(*matrix, strict=True)]


def awq(w):
    """qweight [K, N/8], qzeros [G, N/8]: eight outputs in a word, in AWQ's order."""

    def words(lines):
        return torch.tensor(
            [[_word([part[i] for i in AWQ_ORDER]) for part in _eights(line)] for line in lines]
        ).int()

    return {"qweight": words(_turned(w.q)), "qzeros": words(w.zero), "scales": w.scale}


def gptq(w, *, less_one, with_g_idx=True):
    """qweight [K/8, N]: eight inputs in a word; qzeros [G, N/8], less one in the first version."""
    qweight = torch.tensor([[_word(part) for part in _eights(w.q[n])] for n in range(w.rows)]).int()
    qzeros = _words(w.zero)
    if less_one:
        qzeros = torch.tensor([[_minus_ones(int(word)) for word in line] for line in qzeros]).int()
    tensors = {"qweight": qweight.t().contiguous(), "qzeros": qzeros, "scales": w.scale}
    if with_g_idx:
        tensors["g_idx"] = torch.tensor(w.g_idx).int()
    return tensors


def _minus_ones(word):
    """A word less one in each of its eight integers, borrowing as a 32-bit subtraction does."""
    word = (word - 0x11111111) % (1 << 32)
    return word - (1 << 32) if word >= 1 << 31 else word


def pack_quantized(w, *, symmetric=False, with_g_idx=False):
    """compressed-tensors: weight_packed [N, K/8]; zero points [N/8, G]."""
    tensors = {
        "weight_packed": _words(w.q),
        "weight_scale": w.scale.t().contiguous(),
        "weight_shape": torch.tensor([w.rows, w.columns]),
    }
    if not symmetric:
        by_group = _words(w.zero)
        tensors["weight_zero_point"] = by_group.t().contiguous()
    if with_g_idx:
        tensors["weight_g_idx"] = torch.tensor(w.g_idx).int()
    return tensors


def redhelix(w):
    """W_q [K/2, N], scales and zeros [G, N]; zeros are added, and need not be whole."""
    packed = [
        [w.q[n][k] | (w.q[n][k + 1] << 4) for n in range(w.rows)] for k in range(0, w.columns, 2)
    ]
    zeros = torch.tensor(w.zero, dtype=torch.float32).neg() - 0.375
    return {
        "W_q": torch.tensor(packed, dtype=torch.uint8),
        "scales": w.scale,
        "zeros": zeros.to(torch.bfloat16),
    }


def ours(converted):
    """Dense weight, float64 [N, K], out of a `Converted`, number by number."""
    weight = converted.weight
    rows, columns = weight.shape
    width = columns if weight.group_size == -1 else weight.group_size
    packed = weight.packed.tolist()
    scale, zero_point = weight.scale.double().tolist(), weight.zero_point.double().tolist()
    order = list(range(columns)) if converted.order is None else converted.order.tolist()
    assert sorted(order) == list(range(columns))
    result = torch.zeros((rows, columns), dtype=torch.float64)
    for n in range(rows):
        for k in range(columns):
            byte = packed[k // 2][n]
            q = byte >> 4 if k % 2 else byte & 15
            g = k // width
            result[n, order[k]] = (q + zero_point[g][n]) * scale[g][n]
    return result


E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def nvfp4_values(packed, scale, overall):
    """Dense weight, float64 [N, K], of NVFP4 bytes, a scale for 16 inputs, and one for all."""
    rows, half = packed.shape
    result = torch.zeros((rows, 2 * half), dtype=torch.float64)
    for n in range(rows):
        for k in range(2 * half):
            byte = int(packed[n, k // 2])
            bits = byte >> 4 if k % 2 else byte & 15
            number = E2M1[bits & 7] * (-1.0 if bits & 8 else 1.0)
            result[n, k] = number * float(scale[n, k // 16]) * overall
    return result
