# SPDX-License-Identifier: Apache-2.0
"""Fixtures for kernels in Triton's interpreter, every tensor between two unmapped pages.

The interpreter must be asked for before a kernel is defined, so `test_interpreter.py` runs each
file of cases in a process of its own. A read or write outside a tensor ends that process.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from vllm_nanoquant.kernels import decode as decode_module
from vllm_nanoquant.kernels import fragments, integers, weights
from vllm_nanoquant.kernels import prefill as prefill_module

assert os.environ["TRITON_INTERPRET"] == "1"

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded_empty(shape: tuple[int, ...], dtype: torch.dtype, at_end: bool) -> torch.Tensor:
    """Memory full of NaN (or ones) that begins right after, or ends right before, a dead page."""
    nbytes = max(1, torch.Size(shape).numel()) * dtype.itemsize
    inner = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    total = inner + 2 * mmap.PAGESIZE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    base = _libc.mmap(None, total, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    for page in (base, base + total - mmap.PAGESIZE):
        assert _libc.mprotect(page, mmap.PAGESIZE, 0) == 0
    start = base + mmap.PAGESIZE + (inner - nbytes if at_end else 0)
    buffer = (ctypes.c_char * nbytes).from_address(start)
    ctypes.memset(start, 0xFF, nbytes)
    count = torch.Size(shape).numel()
    return torch.frombuffer(buffer, dtype=dtype)[:count].view(shape)


def guarded(tensor: torch.Tensor, at_end: bool) -> torch.Tensor:
    return guarded_empty(tuple(tensor.shape), tensor.dtype, at_end).copy_(tensor)


@pytest.fixture(params=[False, True], ids=["guard-before", "guard-after"])
def at_end(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch, at_end: bool) -> None:
    """What the kernels' launchers allocate is guarded, and NaN until it is written."""

    def empty(shape: int | tuple[int, ...], dtype: torch.dtype, device: object) -> torch.Tensor:
        return guarded_empty((shape,) if isinstance(shape, int) else shape, dtype, at_end)

    monkeypatch.setattr(decode_module.torch, "empty", empty)
    # PyTorch for CPUs has the function, which raises.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    prefill_module._scratch.clear()


@triton.jit
def plain_magic_pairs(words: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """What the inline assembly of the same name does."""
    return (words & 0x000F000F) | (0x43004300 if dtype == tl.bfloat16 else 0x64006400)


@triton.jit
def plain_times_power(x: tl.tensor, plane: tl.constexpr) -> tl.tensor:
    """What the inline assembly of the same name does, but for zeros (2^-63, 2^-67) and infinity."""
    bits = x.to(tl.int16, bitcast=True).to(tl.int32) + (0x1E00 if plane % 2 == 1 else 0x2000)
    return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def rounded_to_bf16(value: tl.tensor) -> tl.tensor:
    """Bits of fp32 rounded to bf16, ties to even."""
    bits = value.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF


@triton.jit
def plain_fma_pairs(a: tl.tensor, b: tl.tensor, c: tl.tensor) -> tl.tensor:
    """What the inline assembly of the same name does, but for a second rounding, to fp32."""
    low = (a << 16).to(tl.float32, bitcast=True) * (b << 16).to(tl.float32, bitcast=True)
    low += (c << 16).to(tl.float32, bitcast=True)
    high = (a & -65536).to(tl.float32, bitcast=True) * (b & -65536).to(tl.float32, bitcast=True)
    high += (c & -65536).to(tl.float32, bitcast=True)
    return rounded_to_bf16(low) | (rounded_to_bf16(high) << 16)


@pytest.fixture(autouse=True)
def no_inline_assembly(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (fragments, integers, weights):
        monkeypatch.setattr(module, "magic_pairs", plain_magic_pairs)
    monkeypatch.setattr(integers, "times_power", plain_times_power)
    monkeypatch.setattr(weights, "fma_pairs", plain_fma_pairs)


@pytest.fixture(autouse=True)
def kept_subnormals(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU whose tensor cores keep them; a CPU is not asked."""
    monkeypatch.setattr(decode_module, "keeps_subnormals", lambda device: True)


@pytest.fixture(autouse=True)
def exact_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products as a tensor core adds them: exactly, whatever the shape, then rounded to fp32.

    The interpreter keeps bf16 as bit patterns, but casts to it by value, and multiplies them. And
    NumPy's products in fp32 depend, in the last bits, on the shape, on some CPUs and not on others.
    """
    create_bitcast: Callable[..., TensorHandle] = InterpreterBuilder.create_bitcast

    def wide(handle: TensorHandle) -> np.ndarray:
        if handle.dtype.scalar != tl.bfloat16:
            return handle.data.astype(np.float64)
        bits = handle.data.view("uint16").astype("uint32") << 16
        return bits.view("float32").astype(np.float64)

    def dot(
        self: object, a: TensorHandle, b: TensorHandle, d: TensorHandle, *rest: object
    ) -> TensorHandle:
        product = np.matmul(wide(a), wide(b)).astype(np.float32)
        return TensorHandle(product + d.data, d.dtype.scalar)

    def bitcast(self: object, source: TensorHandle, dtype: tl.dtype) -> TensorHandle:
        if dtype.scalar == tl.bfloat16:
            return TensorHandle(source.data.view("uint16"), dtype.scalar)
        return create_bitcast(self, source, dtype)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    monkeypatch.setattr(InterpreterBuilder, "create_bitcast", bitcast)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
