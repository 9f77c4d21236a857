# SPDX-License-Identifier: Apache-2.0
"""Tables and rules: every chunk once, no idle warps, counters that suffice."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_nanoquant.kernels import settings
from vllm_nanoquant.kernels.layout import ARRIVALS_PER_BLOCK
from vllm_nanoquant.kernels.settings import (
    FUSED_LIMIT,
    DecodeLaunch,
    DecodeSettings,
    FusedSettings,
    Gpu,
    decode_rule,
)

CPU = torch.device("cpu")
H200 = Gpu((9, 0), 132)
GPUS = [H200, Gpu((8, 6), 82), Gpu((8, 9), 128), Gpu((12, 0), 170)]
TABLES = list((files("vllm_nanoquant.kernels") / "tuning").iterdir())


@given(gpu=st.sampled_from(GPUS), n=st.integers(1, 140_000), chunks=st.integers(1, 300))
def test_the_rule_covers_every_chunk_and_leaves_no_part_empty(
    gpu: Gpu, n: int, chunks: int
) -> None:
    chosen = decode_rule(gpu, n, chunks)
    per_split = -(-chunks // (chosen.warps_k * chosen.split)) * chosen.warps_k
    assert (chosen.split - 1) * per_split < chunks <= chosen.split * per_split
    assert 1 <= chosen.split <= 16
    assert chosen.warps_k in (1, 2, 4) and chosen.warps_k <= chunks


@given(
    n=st.integers(1, 140_000),
    tokens=st.integers(1, FUSED_LIMIT),
    chunks=st.integers(1, 300),
    chosen=st.sampled_from(
        settings._HOPPER_FUSED + settings._SMALL_HOPPER_FUSED + settings._AMPERE_FUSED
    ),
)
def test_fused_programs_and_counters(
    n: int, tokens: int, chunks: int, chosen: FusedSettings
) -> None:
    programs = chosen.programs(n, tokens, chunks, CPU)
    tiles = -(-n // chosen.rows) * -(-tokens // chosen.tokens)
    assert 1 <= programs <= tiles * chunks
    assert tiles <= -(-n // 64) * ARRIVALS_PER_BLOCK


def test_the_rule_on_the_measured_shapes() -> None:
    """The rule gives what the sweep on an H200 found best, or as good."""
    tall, short = DecodeLaunch(4, 1, 1), DecodeLaunch(2, 1, 2)
    assert decode_rule(H200, 22656, 35) == DecodeSettings(4, 1, tall, short)
    assert decode_rule(H200, 4480, 80) == DecodeSettings(2, 7, short, tall)
    assert decode_rule(H200, 15680, 35).up_to_8 == short
    assert decode_rule(H200, 131072, 35) == DecodeSettings(1, 1, short, tall)


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.name)
def test_shipped_tables_can_be_used(path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = json.loads(path.read_text())
    gpu = Gpu(tuple(measured["capability"]), measured["multiprocessors"])
    assert path.name == f"{gpu.family}.json"
    for shape in measured["shapes"]:
        n, k = map(int, shape.split("x"))
        chunks = -(-k // 128)
        chosen = settings._decode_settings(gpu, n, k, chunks)
        per_split = -(-chunks // (chosen.warps_k * chosen.split)) * chosen.warps_k
        assert (chosen.split - 1) * per_split < chunks <= chosen.split * per_split
        steps = settings._fused_table(gpu, n, k)
        assert [each.up_to for each in steps] == sorted(each.up_to for each in steps)
        assert steps[-1].up_to <= FUSED_LIMIT


def test_a_table_is_for_its_own_number_of_multiprocessors() -> None:
    other = Gpu((9, 0), 114)
    assert settings._decode_settings(other, 22656, 4480, 35) == decode_rule(other, 22656, 35)
