# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import time

import pytest
import torch

from vllm_nanoquant.quantize.gptq import hessian_errors, quantize_gptq
from vllm_nanoquant.quantize.mse import quantize_mse

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("columns", [1111, 1088])  # ragged groups that the kernel takes, or not
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("weighted", [False, True])
def test_mse_gives_the_bytes_of_a_cpu(
    group_size: int, weighted: bool, columns: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(group_size)
    weight = torch.randn(500, columns, generator=generator)
    weight[0] = 0
    weight[1] *= 1e-39
    weight[2] = weight[2].abs()
    weight[3, 100] = 1e4
    weight = weight.to(dtype)
    importance = torch.rand(columns, generator=generator) if weighted else None
    here = quantize_mse(weight, group_size, importance=importance)
    there = quantize_mse(weight, group_size, torch.device("cuda"), importance)
    assert torch.equal(here.packed, there.packed.cpu())
    assert torch.equal(here.scale.view(torch.int16), there.scale.cpu().view(torch.int16))
    assert torch.equal(here.zero_point.view(torch.int16), there.zero_point.cpu().view(torch.int16))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_mse_names_the_row_of_what_is_not_finite(value: float) -> None:
    weight = torch.randn(100, 256).cuda()
    weight[17, 200] = value
    with pytest.raises(ValueError, match=r"1 weights are not finite.*row 17"):
        quantize_mse(weight, 128)


def test_mse_takes_any_strides_and_parts_of_rows() -> None:
    weight = torch.randn(384, 300).bfloat16()
    expected = quantize_mse(weight.t(), 128)
    for strided in (weight.cuda().t(), torch.stack([weight.t()] * 2, 2).cuda()[..., 1]):
        found = quantize_mse(strided, 128)
        assert torch.equal(found.packed.cpu(), expected.packed)


def test_mse_takes_under_three_seconds_for_9b_weights() -> None:
    weight = torch.randn(4480, 15680, device="cuda").bfloat16()
    quantize_mse(weight, 128)  # the first of a shape compiles
    torch.cuda.synchronize()
    start = time.perf_counter()
    quantize_mse(weight, 128)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    print(f"{1e9 * seconds / weight.numel():.3f} ns a weight")
    assert seconds * 8.6e9 / weight.numel() < 3


def test_gptq_beats_mse() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(640, 640, generator=generator)
    inputs = torch.randn(4000, 640, generator=generator) @ mix
    hessian = (inputs.t() @ inputs).cuda()
    weight = torch.randn(256, 640, generator=generator).cuda()
    found, mse = quantize_gptq(weight, hessian, 128), quantize_mse(weight, 128)
    errors = [hessian_errors(weight, hessian, result) for result in (found, mse)]
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()
    assert errors[0].sum() < 0.75 * errors[1].sum()
