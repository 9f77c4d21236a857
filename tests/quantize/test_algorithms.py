# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import get_args

import pytest
import torch

from vllm_nanoquant.quantize.algorithms import ALGORITHMS, quantize
from vllm_nanoquant.quantize.gptq import quantize_gptq
from vllm_nanoquant.quantize.groups import QuantizedWeight
from vllm_nanoquant.quantize.minmax import quantize_minmax
from vllm_nanoquant.quantize.mse import quantize_mse
from vllm_nanoquant.recipe import Algorithm

WEIGHT = torch.randn(6, 80, generator=torch.Generator().manual_seed(0))


def assert_same(one: QuantizedWeight, other: QuantizedWeight) -> None:
    assert torch.equal(one.packed, other.packed)
    assert torch.equal(one.scale, other.scale) and torch.equal(one.zero_point, other.zero_point)


def test_names_are_the_recipes() -> None:
    assert get_args(Algorithm) == ALGORITHMS


def test_each_name_is_its_function() -> None:
    hessian = torch.diag(torch.rand(80, generator=torch.Generator().manual_seed(1)))
    assert_same(quantize(WEIGHT, 32, "minmax"), quantize_minmax(WEIGHT, 32))
    assert_same(quantize(WEIGHT, 32, "mse", hessian=hessian), quantize_mse(WEIGHT, 32))
    found = quantize(WEIGHT, 32, "gptq", hessian=hessian)
    assert_same(found, quantize_gptq(WEIGHT, hessian, 32))


def test_gptq_without_a_hessian_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'gptq' needs calibration text.*use 'mse'"):
        quantize(WEIGHT, 32, "gptq")


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="algorithm is 'magic'; it must be one of minmax, mse"):
        quantize(WEIGHT, 32, "magic")
