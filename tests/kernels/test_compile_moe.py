# SPDX-License-Identifier: Apache-2.0
"""The kernels of a mixture of experts compile for the GPUs we name; see `test_compile.py`."""

from __future__ import annotations

import functools

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.kernels import machine_code_moe
from benchmarks.kernels.disassembly import overwritten_operands
from benchmarks.kernels.machine_code import Variant
from tests.kernels.test_compile import (
    ARCHITECTURES,
    DECODE_LIMITS,
    SPILLED_BYTES,
    TENSOR_CORES,
    check_resources,
    check_waits_first,
)
from vllm_nanoquant.kernels import moe_grouped, settings
from vllm_nanoquant.kernels.moe_grouped import GroupedSettings
from vllm_nanoquant.kernels.settings import Gpu

compile_up = functools.cache(machine_code_moe.compile_up)
compile_down = functools.cache(machine_code_moe.compile_down)
compile_plan = functools.cache(machine_code_moe.compile_plan)

HOPPER = 90
PAIRS = 512


def grouped_settings(
    monkeypatch: pytest.MonkeyPatch, architecture: int
) -> tuple[GroupedSettings, ...]:
    gpu = Gpu(divmod(architecture, 10), 82)
    monkeypatch.setattr(settings, "gpu_of", lambda device: gpu)
    return moe_grouped.grouped_choices(torch.device("cpu"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles(architecture: int, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = Variant(architecture)
    for one_token in (False, True):
        for compiled in (compile_up, compile_down):
            code = compiled(variant, one_token=one_token)
            assert code.spilled_bytes <= SPILLED_BYTES and code.counts["HMMA"], code.summary()
    assert compile_plan(variant, PAIRS).spilled_bytes <= SPILLED_BYTES
    for chosen in grouped_settings(monkeypatch, architecture)[:1]:
        code = machine_code_moe.compile_grouped(chosen, variant)
        assert code.spilled_bytes <= SPILLED_BYTES, code.summary()
        assert TENSOR_CORES.get(architecture, "mma.sync") in code.ptx, code.summary()


@pytest.mark.parametrize("one_token", [False, True])
@pytest.mark.parametrize(
    ("group_size", "group_offset"),
    [(128, 0), (64, 0), pytest.param(128, 32, marks=pytest.mark.slow)],
)
def test_decode_on_sm86(group_size: int, group_offset: int, one_token: bool) -> None:
    variant = Variant(86, group_size=group_size, group_offset=group_offset)
    for compiled in (compile_up, compile_down):
        code = compiled(variant, one_token=one_token)
        check_resources(code)
        limit = DECODE_LIMITS[8][64 if group_offset else group_size]
        assert code.per_weight <= limit, f"more than {limit} per weight: {code.summary()}"
        moved = {kind: code.counts[kind] for kind in ("LDS", "STS", "BAR", "SHFL", "LDL", "STL")}
        assert not any(moved.values()), f"{moved} in the loop: {code.summary()}"


def test_grouped_on_sm86(monkeypatch: pytest.MonkeyPatch) -> None:
    for chosen in grouped_settings(monkeypatch, 86):
        code = machine_code_moe.compile_grouped(chosen, Variant(86))
        check_resources(code)
        assert code.counts["HMMA"] and not code.loop_spills, code.summary()


def test_the_next_kernel_starts_after_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    variant = Variant(HOPPER)
    for one_token in (False, True):
        for compiled in (compile_up, compile_down):
            check_waits_first(compiled(variant, one_token=one_token))
    check_waits_first(compile_plan(variant, PAIRS))
    chosen = grouped_settings(monkeypatch, HOPPER)[0]
    check_waits_first(machine_code_moe.compile_grouped(chosen, variant))


def test_operands_stay_intact_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor cores read the weights from registers; nothing writes these before they have."""
    for chosen in grouped_settings(monkeypatch, HOPPER):
        code = machine_code_moe.compile_grouped(chosen, Variant(HOPPER))
        assert code.counts["HGMMA"] and not code.loop_spills, f"{chosen}: {code.summary()}"
        assert "wgmma.wait_group.sync.aligned 0; mov" in code.ptx, f"{chosen}: no wait in the PTX"
        found = overwritten_operands(code.loop)
        assert not found, f"{chosen}: written too early: {found}; {code.summary()}"
