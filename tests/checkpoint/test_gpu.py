# SPDX-License-Identifier: Apache-2.0
"""Offline quantization with the arithmetic on a GPU: the same tensors as on a CPU."""

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint.small import write_stock
from vllm_nanoquant.checkpoint.quantize import Request, prepare
from vllm_nanoquant.recipe import Recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("algorithm", ["minmax", "mse"])
def test_a_gpu_gives_the_tensors_of_a_cpu(tmp_path, algorithm):
    source = write_stock(tmp_path / "source")
    recipe = Recipe.parse({"preset": "full", "algorithm": algorithm})
    for device in ("cpu", "cuda"):
        prepare(Request("stock", source, tmp_path / device, recipe, device=device)).run()
    here, there = (load_file(tmp_path / device / "model.safetensors") for device in ("cpu", "cuda"))
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)
