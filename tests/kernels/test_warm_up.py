# SPDX-License-Identifier: Apache-2.0
"""What is compiled before serving, on GPUs that are not there."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_nanoquant.kernels import ops, settings
from vllm_nanoquant.kernels.ops import warm_up


@pytest.mark.parametrize("capability", [(8, 6), (9, 0)])
@pytest.mark.parametrize("shape", [(7168, 4480), (256, 512)])
def test_warm_up_meets_every_kernel_with_few_tokens(
    shape: tuple[int, int], capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What large products leave behind would make vLLM's weights take larger blocks of memory."""
    pytest.importorskip("triton")
    from vllm_nanoquant.kernels import prefill

    monkeypatch.setattr(settings, "gpu_of", lambda device: settings.Gpu(capability, 132))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(prefill, "reserve_scratch", lambda device, nbytes: None)
    monkeypatch.setattr(ops, "launching_on", lambda device: nullcontext())
    monkeypatch.setattr(ops, "_warm", set())
    chosen: list[int] = []
    dequantized: list[int] = []
    monkeypatch.setattr(ops, "w4a16", lambda x, weight, bias: chosen.append(x.shape[0]))
    kernels = (None, None, lambda x, weight, bias: dequantized.append(x.shape[0]))
    monkeypatch.setattr(ops, "_kernels", lambda: kernels)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda shape, dtype, device: zeros(shape, device="meta"))
    gpu = torch.device("cuda", 0)
    weight: Any = SimpleNamespace(
        words=SimpleNamespace(device=gpu),
        shape=shape,
        out_features=shape[0],
        in_features=shape[1],
        chunks=shape[1] // 128,
        group_size=128,
        group_offset=0,
    )
    warm_up(weight)
    warm_up(weight)  # the second time it has nothing to do

    def kernel(tokens: int) -> object:
        if tokens <= ops.DECODE_LIMIT:
            return settings.decode_settings(weight, gpu).launch(tokens)
        return settings.fused_settings(weight, tokens, gpu)

    served = range(1, settings.fused_limit(weight, gpu) + 1)
    assert {kernel(tokens) for tokens in served} == {kernel(tokens) for tokens in chosen}
    assert len(dequantized) == 1
    assert max(chosen + dequantized) <= 257
