# SPDX-License-Identifier: Apache-2.0
"""The op on a GPU: real shapes, odd ones, CUDA graphs, determinism, and no late compilation.

Run it under `compute-sanitizer --tool memcheck` (or racecheck) with `-k odd` for odd shapes alone.
"""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import product

import pytest
import torch

from tests.kernels.problem import (
    TOLERANCE,
    FewPrograms,
    Problem,
    mean_relative_error,
    random_problem,
)
from vllm_nanoquant.kernels.layout import RuntimeWeight
from vllm_nanoquant.kernels.ops import DECODE_LIMIT, w4a16, warm_up
from vllm_nanoquant.kernels.settings import FUSED_LIMIT, FusedSettings, is_hopper
from vllm_nanoquant.quantize.groups import WHOLE_ROW, slice_columns
from vllm_nanoquant.quantize.minmax import quantize_minmax

pytest.importorskip("triton")

from vllm_nanoquant.kernels import decode as decode_module
from vllm_nanoquant.kernels import prefill
from vllm_nanoquant.kernels.decode import decode_kernel
from vllm_nanoquant.kernels.fused import arrange_kernel, fused, fused_kernel
from vllm_nanoquant.kernels.integers import keeps_subnormals

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

TOKENS = (1, 2, 3, 7, 8, 9, 16, 17, 33, 64, 100, 300, 1100, 2100)
# N, K, group size, group offset: Nemotron-Nano-9B-v2, its down_proj on rank 1 of 2, and odd ones.
SHAPES = [
    (22656, 4480, 128, 0),
    (4480, 10240, 128, 0),
    (15680, 4480, 128, 0),
    (4480, 15680, 128, 0),
    (4480, 7840, 128, 32),
    (7168, 4480, 64, 0),
    (4480, 5120, 32, 0),
    (4480, 5120, WHOLE_ROW, 0),
]
ODD_SHAPES = [
    (1, 1, 32, 0),
    (3, 17, 64, 63),
    (129, 131, 64, 32),
    (1000, 2049, 128, 77),
    (333, 4095, 32, 1),
    (77, 777, WHOLE_ROW, 0),
]
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def poison_free_memory() -> None:
    """Leave NaN in the memory that the allocator hands out next."""
    junk = [torch.full((1 << size,), float("nan"), device="cuda") for size in range(4, 26)]
    del junk


def cuda_problem(tokens: int, *shape: int, **options: object) -> Problem:
    return random_problem(tokens, *shape, device="cuda", **options)  # type: ignore[arg-type]


def check_accuracy(
    shape: tuple[int, int, int, int], dtype: torch.dtype, tokens: tuple[int, ...]
) -> None:
    problem = cuda_problem(max(tokens), *shape, bias=True, dtype=dtype)
    x, weight, bias = problem.arguments()
    for used in (None, bias):
        expected = replace(problem, bias=used).expected()
        for count in tokens:
            poison_free_memory()
            y = w4a16(x[:count], weight, used)
            assert y.shape == (count, shape[0]) and y.dtype == dtype
            assert mean_relative_error(y, expected[:count]) <= TOLERANCE
    assert not weight.arrivals.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_accuracy(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check_accuracy(shape, dtype, TOKENS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_accuracy_of_odd_shapes(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check_accuracy(shape, dtype, (1, 7, 16, 17, 100, 200, 1100))


def test_tensor_cores_keep_subnormals() -> None:
    """On every GPU tried so far; where they do not, decode falls back to the other form."""
    assert keeps_subnormals(torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("shape", [(4480, 10240, 128, 0), (1000, 2049, 128, 77)])
def test_both_forms_of_integers(
    shape: tuple[int, int, int, int], kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_module, "keeps_subnormals", lambda device: kept)
    check_accuracy(shape, torch.bfloat16, (1, 8, 9, 16))


@pytest.mark.parametrize("power", [-40, 40])
def test_tokens_of_any_size(power: int) -> None:
    """x is multiplied by 2^64 on its way into the tensor cores."""
    x, weight, _ = cuda_problem(8, 4480, 10240).arguments()
    expected = w4a16(x, weight) * 2.0**power
    assert torch.equal(w4a16(x * 2.0**power, weight), expected)


@pytest.mark.parametrize("tokens", [24, 64, 128, 512])
def test_tensor_cores_never_read_the_next_weights(tokens: int) -> None:
    """A busy GPU delays them; without the wait in `fused` this fails on an H200."""
    problem = cuda_problem(tokens, 22656, 4480)
    x, weight, bias = problem.arguments()
    expected = problem.expected()
    for settings in every_fused_setting(tokens):
        results = [fused(x, weight, bias, settings) for _ in range(3)]
        assert mean_relative_error(results[0], expected) <= TOLERANCE
        assert all(torch.equal(each, results[0]) for each in results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(129, 131, 64, 32), (1000, 2049, 128, 77)])
def test_fused_however_odd_shapes_are_cut(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    """Programs with tiles of their own, with parts of one or of several, and with none."""
    problem = cuda_problem(200, *shape, bias=True, dtype=dtype)
    x, weight, bias = problem.arguments()
    expected = problem.expected()
    tiles = [(64, 32, 4), (128, 64, 8)]
    if is_hopper(x.device):
        tiles += [(64, 128, 4), (128, 256, 8)]
    for (rows, width, warps), programs in product(tiles, (2, 5, 13)):
        settings = FewPrograms(200, rows, width, warps, 2, programs, width == 256)
        poison_free_memory()
        y = fused(x, weight, bias, settings)
        assert mean_relative_error(y, expected) <= TOLERANCE
        assert torch.equal(fused(x, weight, bias, settings), y)
    assert not weight.arrivals.any()


def every_fused_setting(tokens: int) -> list[FusedSettings]:
    rows_warps = [(64, 4), (128, 4), (128, 8)] if is_hopper(torch.device("cuda", 0)) else [(128, 4)]
    width = 64 if tokens > 32 else 32
    return [
        FusedSettings(1024, rows, width, warps, 3, programs, prefetch)
        for rows, warps in rows_warps
        for programs in (1, 2, 3)
        for prefetch in (False, True)
    ]


def test_lm_head_goes_through_a_bounded_scratch() -> None:
    problem = cuda_problem(FUSED_LIMIT + 52, 131072, 4480)
    expected = problem.expected()
    x, weight, bias = problem.arguments()
    warm_up(weight)
    assert prefill._scratch[x.device].nbytes <= prefill.SCRATCH_BYTES
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = w4a16(x, weight, bias)
    assert torch.cuda.max_memory_allocated() - before <= y.nbytes + (1 << 20)
    assert mean_relative_error(y, expected) <= TOLERANCE


def test_dequantizing_waits_for_what_still_reads_the_buffer() -> None:
    """It starts while the product before it still runs, here one that takes the buffer for x."""
    head = cuda_problem(1, 131072, 4480).arguments()[1]
    weight = cuda_problem(1, 4480, 4480).arguments()[1]
    buffer = torch.randn((4480, 4480), dtype=torch.bfloat16, device="cuda")
    before, x = buffer.clone(), buffer[:DECODE_LIMIT]
    expected = w4a16(x, head)
    prefill.dequantize_rows(weight, buffer, 0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = w4a16(x, head)
        prefill.dequantize_rows(weight, buffer, 0)
    for _ in range(3):
        buffer.copy_(before)
        graph.replay()
        assert torch.equal(y, expected)


def test_no_tokens() -> None:
    problem = cuda_problem(0, 100, 64, 32)
    assert w4a16(*problem.arguments()).shape == (0, 100)
    problem.x = torch.empty(2, 0, 64, device="cuda", dtype=torch.bfloat16)
    assert w4a16(*problem.arguments()).shape == (2, 0, 100)


@pytest.mark.parametrize("tokens", [6, 40, 1100])
def test_strided_and_misaligned_tokens(tokens: int) -> None:
    problem = cuda_problem(tokens, 4480, 5120)
    expected = w4a16(*problem.arguments())
    x = problem.x
    wide = torch.full((tokens, 6000), float("nan"), device="cuda", dtype=x.dtype)
    wide[:, 5:5125] = x
    shifted = torch.empty(x.numel() + 1, device="cuda", dtype=x.dtype)[1:].view_as(x).copy_(x)
    assert shifted.data_ptr() % 16
    for other in (x.t().contiguous().t(), wide[:, 5:5125], shifted, x.view(2, tokens // 2, -1)):
        y = w4a16(*replace(problem, x=other).arguments())
        assert torch.equal(y.view_as(expected), expected)


@pytest.mark.parametrize("shape", SHAPES + ODD_SHAPES)
def test_decode_is_deterministic_and_rows_stand_alone(shape: tuple[int, int, int, int]) -> None:
    x, weight, bias = cuda_problem(DECODE_LIMIT, *shape, bias=True).arguments()
    y = w4a16(x, weight, bias)
    for _ in range(5):
        poison_free_memory()
        assert torch.equal(w4a16(x, weight, bias), y)
    for tokens in range(1, DECODE_LIMIT + 1):
        part = w4a16(x[DECODE_LIMIT - tokens :], weight, bias)
        assert torch.equal(part, y[DECODE_LIMIT - tokens :])


@pytest.mark.parametrize("tokens", [17, 40, 128, 300, 768, 1100])
def test_more_tokens_repeat_bit_for_bit(tokens: int) -> None:
    x, weight, bias = cuda_problem(tokens, 4480, 10240, bias=True).arguments()
    y = w4a16(x, weight, bias)
    for _ in range(5):
        poison_free_memory()
        assert torch.equal(w4a16(x, weight, bias), y)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 7, 8, 32, 512, 1100])
@pytest.mark.parametrize("shape", [(4480, 10240, 128, 0), (22656, 4480, 128, 0)])
def test_cuda_graph(shape: tuple[int, int, int, int], tokens: int) -> None:
    x, weight, bias = cuda_problem(tokens, *shape, bias=True).arguments()
    warm_up(weight, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = w4a16(x, weight, bias)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        expected = w4a16(x, weight, bias)
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, expected)


def test_nothing_compiles_after_the_warm_up() -> None:
    kernels = (decode_kernel, arrange_kernel, fused_kernel, prefill.dequantize_kernel)

    def compiled() -> list[int]:
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]

    x, weight, bias = cuda_problem(900, 2240, 1600, 64, bias=True).arguments()
    warm_up(weight, bias)
    before = compiled()
    for tokens in (*range(1, 140), *range(140, 901, 7)):
        w4a16(x[900 - tokens :], weight, bias)
    assert compiled() == before


def test_fp32_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x is torch\.float32; on a GPU"):
        w4a16(*cuda_problem(2, 20, 64, 32, dtype=torch.float32).arguments())


def test_tensor_parallel_shares_add_up() -> None:
    weight = quantize_minmax(torch.randn(4480, 15680, device="cuda"), 128)
    x = torch.randn(4, 15680, device="cuda", dtype=torch.bfloat16)
    expected = Problem(x, weight, None).expected()
    total = torch.zeros_like(expected)
    for start in (0, 7840):
        part = slice_columns(weight, start, start + 7840)
        total += w4a16(*Problem(x[:, start : start + 7840], part, None).arguments())
    assert mean_relative_error(total, expected) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(3000, 4480), (333, 1000), (4480, 15681)])
def test_quantizes_to_the_same_bytes_as_a_cpu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = (torch.randn(shape) * 0.02).to(dtype)
    weight[0] = 0.0
    weight[1, :64] = -0.0
    weight[2:4] *= 1e-5
    here, there = quantize_minmax(weight, 64), quantize_minmax(weight.cuda(), 64)
    assert torch.equal(there.packed.cpu(), here.packed)
    for name in ("scale", "zero_point"):
        bits = getattr(there, name).cpu().view(torch.int16)
        assert torch.equal(bits, getattr(here, name).view(torch.int16))


def test_packing_is_fast_and_needs_little_memory() -> None:
    weight = quantize_minmax(torch.randn(22656, 4480, device="cuda"), 128)
    RuntimeWeight.from_quantized(weight)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    result = RuntimeWeight.from_quantized(weight)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    assert weight.nbytes / seconds >= 1e9, f"{weight.nbytes / seconds / 1e9:.1f} GB/s"
    assert torch.cuda.max_memory_allocated() - before - result.nbytes <= 256 << 20


def test_quantizing_fits_beside_the_weight() -> None:
    weight = torch.randn(22656, 4480, device="cuda", dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = quantize_minmax(weight, 128)
    assert torch.cuda.max_memory_allocated() - before - result.nbytes <= 64 << 20
