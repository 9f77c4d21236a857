# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import time

import pytest
import torch

from vllm_nanoquant.quantize.gptq import hessian_errors, quantize_gptq
from vllm_nanoquant.quantize.mse import quantize_mse

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("weighted", [False, True])
def test_mse_gives_the_bytes_of_a_cpu(group_size: int, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(group_size)
    weight = torch.randn(500, 1111, generator=generator).bfloat16()
    importance = torch.rand(1111, generator=generator) if weighted else None
    here = quantize_mse(weight, group_size, importance=importance)
    there = quantize_mse(weight, group_size, torch.device("cuda"), importance)
    assert torch.equal(here.packed, there.packed.cpu())
    assert torch.equal(here.scale.view(torch.int16), there.scale.cpu().view(torch.int16))
    assert torch.equal(here.zero_point.view(torch.int16), there.zero_point.cpu().view(torch.int16))


def test_mse_takes_under_a_minute_for_9b_weights() -> None:
    weight = torch.randn(4480, 15680, device="cuda").bfloat16()
    quantize_mse(weight[:300], 128)
    torch.cuda.synchronize()
    start = time.perf_counter()
    quantize_mse(weight, 128)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    assert seconds * 8.6e9 / weight.numel() < 60


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
