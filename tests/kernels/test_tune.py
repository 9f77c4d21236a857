# SPDX-License-Identifier: Apache-2.0
"""What the tuner chooses from given times; the times themselves need a GPU."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch

pytest.importorskip("triton")

from vllm_nanoquant.kernels import tune
from vllm_nanoquant.kernels.layout import RuntimeWeight
from vllm_nanoquant.kernels.settings import Gpu

H200 = Gpu((9, 0), 132)
# qkv_proj of Nemotron-Nano-9B-v2.
N, CHUNKS = 7168, 35

Run = Callable[[torch.Tensor, RuntimeWeight], torch.Tensor]


class GivenTimes:
    """A shape whose times are known: microseconds by tokens, for some cuts (warps_k, split)."""

    def __init__(self, by_cut: dict[tuple[int, int], dict[int, float]]) -> None:
        self.by_cut = by_cut

    def measure(self, tokens: int, run: Run, name: str) -> float:
        """The time of a cut, 1 % more the fewer tiles a warp has; infinite for other cuts."""
        found = re.search(r"warps_k=(\d+), split=(\d+).*?tiles=(\d+)", name)
        assert found
        warps_k, split, tiles = map(int, found.groups())
        times = self.by_cut.get((warps_k, split))
        return times[tokens] * (1.04 - 0.01 * tiles) if times else math.inf


def chosen(by_cut: dict[tuple[int, int], dict[int, float]]) -> dict[str, Any]:
    return tune.tune_decode(H200, cast(tune.Shape, GivenTimes(by_cut)), N, CHUNKS)


def test_a_gain_at_16_tokens_does_not_pay_for_a_loss_at_1_and_8() -> None:
    """Both cuts as measured on an H200 (h200-decode-trials.json): the first, in spite of 12.1."""
    entry = chosen({(4, 1): {1: 8.3, 8: 8.8, 16: 12.1}, (1, 7): {1: 9.0, 8: 9.7, 16: 9.8}})
    assert (entry["warps_k"], entry["split"]) == (4, 1)
    entry = chosen({(4, 1): {1: 8.3, 8: 8.8, 16: 12.1}, (1, 7): {1: 8.4, 8: 8.9, 16: 9.8}})
    assert (entry["warps_k"], entry["split"]) == (1, 7)


def test_each_number_of_tokens_gets_its_own_launch() -> None:
    entry = chosen({(4, 1): {1: 8.3, 8: 8.8, 16: 12.1}})
    assert entry["up_to_8"]["tiles"] == entry["up_to_16"]["tiles"] == 4


def test_registers_let_a_multiprocessor_hold_its_share() -> None:
    """980 programs of 64 threads: 8 for some, which 128 registers allow and 144 do not."""
    launches = tune.decode_launches(H200, 4480, (2, 7), {(2, 2): (104, 144)})
    assert [each.registers for each in launches] == [128, 144]
    # 22 programs of a warp each would leave 88 registers, too few.
    launches = tune.decode_launches(H200, 22656, (1, 4), {(2, 2): (104, 144)})
    assert [each.registers for each in launches] == [144]


def test_registers_are_counted_by_quarters_of_a_multiprocessor() -> None:
    """14 warps: 4 for two of the quarters, which 128 registers allow, not 65536 / (32 * 14)."""
    launches = tune.decode_launches(H200, 4480, (1, 13), {(2, 2): (104, 144)})
    assert [each.registers for each in launches] == [128, 144]


@pytest.mark.parametrize(("n", "chunks"), [(1, 1), (256, 4), (4480, 123), (131072, 35)])
def test_there_is_a_candidate_for_any_shape(n: int, chunks: int) -> None:
    cuts = tune.decode_candidates(H200, n, chunks)
    assert cuts
    for warps_k, split in cuts:
        per_split = -(-chunks // (warps_k * split)) * warps_k
        assert (split - 1) * per_split < chunks <= split * per_split


def test_close_times_are_measured_again() -> None:
    """One lucky time does not win, and what is far behind is not measured twice."""
    times = {"lucky": [9.8, 10.4, 10.5], "steady": [10.0, 10.0, 10.1], "slow": [12.0]}
    given = {name: iter(each) for name, each in times.items()}
    assert tune.fastest(given, lambda name: next(given[name])) == (10.0, "steady")


def test_candidates_that_all_fail_are_not_tried_again() -> None:
    tried: list[str] = []

    def measure(name: str) -> float:
        tried.append(name)
        return math.inf

    assert tune.fastest(["one", "two"], measure)[0] == math.inf
    assert tried == ["one", "two"]


@pytest.mark.parametrize("text", ["4096", "4096x", "4096x0", "axb", "1x2x3", ""])
def test_a_wrong_shape_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        tune.parse_shapes(f"22656x4480,{text}")


def test_shapes_are_rows_by_columns() -> None:
    assert tune.parse_shapes("22656x4480,16X32") == [(22656, 4480), (16, 32)]
