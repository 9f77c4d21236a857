# SPDX-License-Identifier: Apache-2.0
import pytest

from vllm_nanoquant.checkpoint.errors import UsageError
from vllm_nanoquant.planner import speed
from vllm_nanoquant.planner.speed import Gpu, Traffic, known_gpu

GPU = Gpu("of 100 GB/s", 1, 200e9, 0.5)


def test_a_step_by_hand():
    traffic = Traffic(weights=10**9, experts=8 * 10**8, state=10**7, layers=10, choice=0.25)
    assert traffic.token_bytes() == 10**9 + 2 * 10**8 + 2 * 10**7
    # Two tokens choose 7 of 16 of the experts.
    assert traffic.expert_share(2) == pytest.approx(7 / 16)
    one = 1.22e9 / 100e9 * 1e6 + 10 * speed.LAYER_US
    two = (1e9 + 3.5e8 + 4e7) / 100e9 * 1e6 + 10 * (speed.LAYER_US + speed.SEQUENCE_US)
    assert traffic.step_us(GPU, 1) == pytest.approx(one)
    assert traffic.step_us(GPU, 2) == pytest.approx(two)
    assert traffic.step_us(GPU, 1, 2) == pytest.approx(one + 10 * speed.ALL_REDUCE_US)
    assert traffic.tokens_per_second(GPU, 2) == pytest.approx(2e6 / two)


@pytest.mark.parametrize("name", ["RTX 3090", "rtx3090", "NVIDIA GeForce RTX 3090", "RTX-3090"])
def test_names_of_gpus(name):
    assert known_gpu(name).memory == 24 << 30


@pytest.mark.parametrize("name", ["", "3090", "RTX 3090 Ti", "H200\x1b[31m"])
def test_gpus_that_are_not_known(name):
    with pytest.raises(UsageError, match="is not known; known: RTX 3090, RTX 4090") as caught:
        known_gpu(name)
    assert "\x1b" not in str(caught.value)
