# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels in Triton's interpreter, every tensor between two unmapped pages.

`test_interpreter.py` runs this file in a process of its own, since the interpreter must be asked
for before a kernel is defined. A read or write outside a tensor ends that process.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator

import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from tests.kernels.problem import Problem, mean_relative_error, random_problem
from vllm_nanoquant.kernels import decode as decode_module
from vllm_nanoquant.kernels import prefill as prefill_module
from vllm_nanoquant.kernels.decode import decode
from vllm_nanoquant.kernels.prefill import prefill
from vllm_nanoquant.quantize.groups import QuantizedWeight

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
    return torch.frombuffer(buffer, dtype=dtype, count=count).view(shape)


def guarded(tensor: torch.Tensor, at_end: bool) -> torch.Tensor:
    return guarded_empty(tuple(tensor.shape), tensor.dtype, at_end).copy_(tensor)


def guard(problem: Problem, at_end: bool) -> Problem:
    w = problem.weight
    weight = QuantizedWeight(
        guarded(w.packed, at_end),
        guarded(w.scale, at_end),
        guarded(w.zero_point, at_end),
        w.group_size,
        w.in_features,
        w.group_offset,
    )
    bias = None if problem.bias is None else guarded(problem.bias, at_end)
    return Problem(guarded(problem.x, at_end), weight, bias)


@pytest.fixture(params=[False, True], ids=["guard-before", "guard-after"])
def at_end(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch, at_end: bool) -> None:
    """What the kernels' launchers allocate is guarded, and NaN until it is written."""

    def empty(shape: int | tuple[int, ...], dtype: torch.dtype, device: object) -> torch.Tensor:
        return guarded_empty((shape,) if isinstance(shape, int) else shape, dtype, at_end)

    monkeypatch.setattr(decode_module.torch, "empty", empty)


@pytest.fixture(autouse=True)
def products_of_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bf16 as bit patterns and would multiply those as integers."""
    interpreted: Callable[..., TensorHandle] = InterpreterBuilder.create_dot

    def widened(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype("uint32") << 16).view("float32"), tl.float32)

    def create_dot(self: object, a: TensorHandle, b: TensorHandle, *rest: object) -> TensorHandle:
        return interpreted(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture(autouse=True)
def few_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_module, "multiprocessors", lambda device: 2)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


# N, K, group size, group offset: one element, odd sizes, K < g, ragged ends, cut first groups,
# both parities of the offset, several blocks of N, a split along K and none (N = 1100).
SHAPES = [
    (1, 1, 32, 0),
    (1, 1, 32, 31),
    (3, 17, 32, 0),
    (16, 64, 64, 0),
    (33, 65, 32, 5),
    (129, 131, 64, 32),
    (40, 300, 128, 127),
    (300, 257, 128, 96),
    (130, 259, 128, 1),
    (1100, 40, 32, 8),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("tokens", "bias"), [(1, False), (7, True), (16, False)])
def test_decode(
    shape: tuple[int, int, int, int], tokens: int, bias: bool, dtype: torch.dtype, at_end: bool
) -> None:
    problem = guard(random_problem(tokens, *shape, bias=bias, dtype=dtype), at_end)
    y = decode(*problem.arguments())
    assert y.dtype == dtype
    assert mean_relative_error(y, problem.expected()) <= (4e-3 if dtype == torch.bfloat16 else 5e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_prefill(
    shape: tuple[int, int, int, int], bias: bool, dtype: torch.dtype, at_end: bool
) -> None:
    problem = guard(random_problem(20, *shape, bias=bias, dtype=dtype), at_end)
    y = prefill(*problem.arguments())
    assert y.dtype == dtype
    assert mean_relative_error(y, problem.expected()) <= 5e-3


def test_prefill_in_parts(monkeypatch: pytest.MonkeyPatch, at_end: bool) -> None:
    problem = guard(random_problem(17, 300, 77, 32, 5, bias=True), at_end)
    whole = prefill(*problem.arguments())
    monkeypatch.setattr(prefill_module, "SCRATCH_BYTES", 130 * 77 * 2)
    assert torch.equal(prefill(*problem.arguments()), whole)


@pytest.mark.parametrize("shape", [(300, 257, 64, 96 % 64), (1100, 40, 32, 8)])
def test_decode_repeats_itself_and_rows_stand_alone(
    shape: tuple[int, int, int, int], at_end: bool
) -> None:
    problem = guard(random_problem(16, *shape, dtype=torch.float16), at_end)
    y = decode(*problem.arguments())
    assert torch.equal(decode(*problem.arguments()), y)
    for row in (0, 3, 15):
        alone = Problem(problem.x[row : row + 1].clone(), problem.weight, None)
        assert torch.equal(decode(*alone.arguments())[0], y[row])


def test_a_row_of_nan_stays_in_its_row(at_end: bool) -> None:
    problem = guard(random_problem(5, 40, 100, 32, dtype=torch.float16), at_end)
    y = decode(*problem.arguments())
    problem.x[2] = float("nan")
    poisoned = decode(*problem.arguments())
    assert poisoned[2].isnan().all()
    assert torch.equal(poisoned[[0, 1, 3, 4]], y[[0, 1, 3, 4]])
