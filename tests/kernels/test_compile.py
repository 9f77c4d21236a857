# SPDX-License-Identifier: Apache-2.0
"""Every kernel compiles for the GPUs we name; on SM86 within registers and shared memory.

No GPU is needed: Triton compiles for any target, and brings the tools that read the result. The
limits hold for Triton 3.6 to 3.9.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.version import Version

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from benchmarks.kernels import machine_code  # noqa: E402
from benchmarks.kernels.disassembly import Instruction, overwritten_operands  # noqa: E402
from benchmarks.kernels.layers import LAYERS  # noqa: E402
from benchmarks.kernels.machine_code import MachineCode, Variant  # noqa: E402
from vllm_nanoquant.kernels import settings  # noqa: E402
from vllm_nanoquant.kernels.settings import (  # noqa: E402
    FEW_WARPS,
    MANY_WARPS,
    DecodeSettings,
    FusedSettings,
    Gpu,
)

compile_decode = functools.cache(machine_code.compile_decode)
compile_fused = functools.cache(machine_code.compile_fused)

# A100, RTX 3090, RTX 4090, H200, B200, RTX 5090: multiprocessors.
MULTIPROCESSORS = {80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}
ARCHITECTURES = tuple(MULTIPROCESSORS)
# What a multiprocessor of SM86 has, and what one program can have of it.
SHARED_BYTES, SHARED_BYTES_PER_PROGRAM = 102400, 101376
# Per thread, elsewhere than on SM86: an address or two.
SPILLED_BYTES = 16
# Instructions per weight of groups of 32, 64, 128; an RTX 3090 that reads 5 bits per weight at 90 %
# of its bandwidth has time for 13.
DECODE_LIMITS = {8: {32: 3.75, 64: 2.75, 128: 2.5}, 16: {32: 4.5, 64: 3.5, 128: 3.5}}
# The fused kernel's instruction in PTX, where it is not mma.sync.
TENSOR_CORES = {90: "wgmma.mma_async", 100: "tcgen05.mma"}
NEEDS_SHARED_MEMORY = pytest.mark.xfail(
    strict=True,
    reason="8 scale words per lane: Triton spreads the load over two lanes and exchanges them",
)
# From then on Triton itself waits for the operands (triton-lang/triton#9514).
TRITON_WAITS = Version(triton.__version__) >= Version("3.9")

Weight = Any


def weight(layer: str, group_size: int) -> Weight:
    """What settings look at of a layer's weight."""
    n, k = LAYERS[layer].n, LAYERS[layer].k
    return SimpleNamespace(shape=(n, k), chunks=-(-k // 128), group_size=group_size)


def on_gpu(monkeypatch: pytest.MonkeyPatch, architecture: int) -> torch.device:
    """A device that settings take for a GPU of this architecture."""
    gpu = Gpu(divmod(architecture, 10), MULTIPROCESSORS[architecture])
    monkeypatch.setattr(settings, "gpu_of", lambda device: gpu)
    return torch.device("cpu")


def decode_settings(
    monkeypatch: pytest.MonkeyPatch, architecture: int, layer: str, group_size: int
) -> DecodeSettings:
    device = on_gpu(monkeypatch, architecture)
    return settings.decode_settings(weight(layer, group_size), device)


def fused_settings(
    monkeypatch: pytest.MonkeyPatch,
    architecture: int,
    group_size: int,
    layers: Iterable[str] = ("in_proj",),
) -> list[FusedSettings]:
    """The settings of these layers for all numbers of tokens, each once."""
    device = on_gpu(monkeypatch, architecture)
    chosen = {
        settings.fused_settings(each, tokens, device): None
        for each in (weight(layer, group_size) for layer in layers)
        for tokens in settings.fused_buckets(each, device)
    }
    return list(chosen)


def check_resources(code: MachineCode) -> None:
    assert code.spilled_bytes == 0, code.summary()
    assert code.shared_bytes <= SHARED_BYTES_PER_PROGRAM, code.summary()


@pytest.mark.parametrize(
    ("dtype", "group_size"),
    [
        ("bf16", 128),
        pytest.param("fp16", 32, marks=pytest.mark.slow),
        pytest.param("bf16", 64, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles(
    architecture: int, dtype: str, group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = Variant(architecture, dtype, group_size)
    chosen = decode_settings(monkeypatch, architecture, "out_proj", group_size)
    for tokens in (8, 16):
        code = compile_decode(chosen, tokens, variant)
        assert code.spilled_bytes <= SPILLED_BYTES, f"decode, {tokens} tokens: {code.summary()}"
        assert code.counts["HMMA"], f"decode, {tokens} tokens: {code.summary()}"
    code = compile_fused(fused_settings(monkeypatch, architecture, group_size)[0], variant)
    assert code.spilled_bytes <= SPILLED_BYTES, f"fused: {code.summary()}"
    assert TENSOR_CORES.get(architecture, "mma.sync") in code.ptx, f"fused: {code.summary()}"
    code = machine_code.compile_dequantize(variant)
    assert code.spilled_bytes == 0, f"dequantize: {code.summary()}"
    stores = {each.opcode for each in code.instructions if each.opcode.startswith("STG")}
    assert stores == {"STG.E.128"}, f"dequantize: {stores}; {code.summary()}"
    if group_size == 128:
        code = machine_code.compile_arrange(variant)
        assert code.spilled_bytes == 0, f"arrange: {code.summary()}"


@pytest.mark.parametrize("tokens", [8, 16])
@pytest.mark.parametrize(
    "layer", ["in_proj", "out_proj", "mlp_up", "mlp_down", "qkv_proj", "o_proj", "lm_head"]
)
def test_the_registers_of_the_h200_table_suffice(
    layer: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = decode_settings(monkeypatch, 90, layer, 128)
    code = compile_decode(chosen, tokens, Variant(90))
    assert code.spilled_bytes <= SPILLED_BYTES and not code.loop_spills, code.summary()


def check_waits_first(code: MachineCode) -> None:
    """No more than words may be read, and the next start, before the wait; see `overlap.py`."""
    order = re.findall(r"griddepcontrol\.(wait|launch_dependents)", code.ptx)
    assert order, f"neither waits nor starts the next: {code.summary()}"
    assert order == ["wait", "launch_dependents"] * (len(order) // 2), f"{order}: {code.summary()}"
    before, _ = code.ptx.split("griddepcontrol.wait", maxsplit=1)
    assert "cp.async.bulk" not in before, f"reads x before the wait: {code.summary()}"


def test_the_next_kernel_starts_after_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    variant = Variant(90)
    chosen = decode_settings(monkeypatch, 90, "out_proj", 128)
    check_waits_first(compile_decode(chosen, 8, variant))
    chosen_fused = fused_settings(monkeypatch, 90, 128, LAYERS)
    for prefetch in (False, True):
        found = next(each for each in chosen_fused if each.prefetch == prefetch)
        check_waits_first(compile_fused(found, variant))
    check_waits_first(machine_code.compile_arrange(variant))
    check_waits_first(machine_code.compile_dequantize(variant))


@pytest.mark.parametrize("tokens", [8, 16])
@pytest.mark.parametrize(
    ("layer", "group_size"),
    [
        ("in_proj", 128),
        ("out_proj", 128),
        pytest.param("mlp_up", 128, marks=pytest.mark.slow),
        ("out_proj", 64),
        ("out_proj", 32),
        pytest.param("in_proj", 64, marks=pytest.mark.slow),
        pytest.param("in_proj", 32, marks=pytest.mark.slow),
    ],
)
def test_decode_on_sm86(
    layer: str, group_size: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = decode_settings(monkeypatch, 86, layer, group_size)
    code = compile_decode(chosen, tokens, Variant(86, group_size=group_size))
    check_resources(code)
    tiles = chosen.launch(tokens).tiles
    limit = DECODE_LIMITS[tokens][group_size]
    assert code.per_weight <= limit, f"more than {limit} per weight: {code.summary()}"
    # Two per tile for the words, four for every 8 tokens.
    wide = code.counts["LDG.128"]
    assert wide >= 2 * tiles + tokens // 2, f"{tiles} tiles, {wide} wide loads: {code.summary()}"


@pytest.mark.parametrize("tokens", [8, 16])
def test_decode_where_tensor_cores_lose_subnormals(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = decode_settings(monkeypatch, 86, "in_proj", 128)
    code = compile_decode(chosen, tokens, Variant(86, subnormal=False))
    check_resources(code)
    assert code.per_weight <= DECODE_LIMITS[tokens][128], code.summary()
    fewer = compile_decode(chosen, tokens, Variant(86))
    assert fewer.per_weight < code.per_weight, f"{fewer.summary()}; without: {code.summary()}"


@pytest.mark.parametrize("tokens", [8, 16])
@pytest.mark.parametrize(
    ("layer", "group_size"),
    [
        ("in_proj", 128),
        ("out_proj", 128),
        pytest.param("mlp_up", 128, marks=pytest.mark.slow),
        ("out_proj", 64),
        pytest.param("out_proj", 32, marks=NEEDS_SHARED_MEMORY),
    ],
)
def test_decode_keeps_weights_in_registers(
    layer: str, group_size: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = decode_settings(monkeypatch, 86, layer, group_size)
    code = compile_decode(chosen, tokens, Variant(86, group_size=group_size))
    assert code.loop, "no loop with matrix instructions"
    moved = {
        kind: code.counts[kind] for kind in ("LDS", "LDSM", "STS", "BAR", "SHFL", "LDL", "STL")
    }
    assert not any(moved.values()), f"{moved} in the loop: {code.summary()}"


@pytest.mark.parametrize(
    ("layer", "group_size"),
    [("in_proj", 128), ("out_proj", 128), ("out_proj", 64)],
)
def test_as_many_warps_at_once_as_the_rule_counts_on(
    layer: str, group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = decode_settings(monkeypatch, 86, layer, group_size)
    code = compile_decode(chosen, 8, Variant(86, group_size=group_size))
    warps = code.programs_at_once(SHARED_BYTES) * code.warps
    wanted = {1: MANY_WARPS, 2: FEW_WARPS}[chosen.up_to_8.prefetch]
    assert warps >= wanted, f"{warps} warps at once, not {wanted}: {code.summary()}"
    # More tokens need more registers; where warps have twice the tiles, half as many will do.
    code = compile_decode(chosen, 16, Variant(86, group_size=group_size))
    warps = code.programs_at_once(SHARED_BYTES) * code.warps
    wanted = wanted * 2 // chosen.up_to_16.tiles
    assert warps >= wanted, f"{warps} warps at once, not {wanted}: {code.summary()}"


@pytest.mark.parametrize(
    ("dtype", "group_size"),
    [
        ("bf16", 128),
        ("fp16", 128),
        pytest.param("bf16", 32, marks=pytest.mark.slow),
        pytest.param("bf16", 64, marks=pytest.mark.slow),
        pytest.param("fp16", 32, marks=pytest.mark.slow),
    ],
)
def test_fused_on_sm86(dtype: str, group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for chosen in fused_settings(monkeypatch, 86, group_size):
        code = compile_fused(chosen, Variant(86, dtype, group_size))
        check_resources(code)
        assert code.counts["HMMA"] and not code.loop_spills, code.summary()
        at_once = code.programs_at_once(SHARED_BYTES)
        assert at_once >= chosen.per_multiprocessor, f"{chosen}: {at_once} fit; {code.summary()}"


def test_unaligned_on_sm86(monkeypatch: pytest.MonkeyPatch) -> None:
    variant = Variant(86, has_bias=True, aligned=False)
    odd = weight("out_proj", 128)
    odd.shape = (4479, 10239)
    chosen = settings.decode_settings(odd, on_gpu(monkeypatch, 86))
    check_resources(compile_decode(chosen, 8, variant))
    code = compile_decode(chosen, 16, variant)
    # Addresses of single numbers of x take more registers than there are.
    assert code.spilled_bytes <= 64, code.summary()
    for each in fused_settings(monkeypatch, 86, 128):
        check_resources(compile_fused(each, variant))
    check_resources(machine_code.compile_arrange(variant))
    check_resources(machine_code.compile_dequantize(variant))


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [8, 16])
@pytest.mark.parametrize("layer", ["in_proj", "out_proj"])
def test_shards_on_sm86(layer: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first group of a shard may have begun in the shard before it."""
    chosen = decode_settings(monkeypatch, 86, layer, 128)
    code = compile_decode(chosen, tokens, Variant(86, group_offset=64))
    check_resources(code)
    limit = DECODE_LIMITS[tokens][64]
    assert code.per_weight <= limit, f"more than {limit} per weight: {code.summary()}"


@pytest.mark.parametrize(
    ("dtype", "group_size", "layers"),
    [
        ("bf16", 128, ("in_proj",)),
        pytest.param("bf16", 128, tuple(LAYERS), marks=pytest.mark.slow),
        pytest.param("bf16", 32, tuple(LAYERS), marks=pytest.mark.slow),
        pytest.param("fp16", 128, tuple(LAYERS), marks=pytest.mark.slow),
    ],
)
def test_operands_stay_intact_on_hopper(
    dtype: str, group_size: int, layers: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensor cores read the weights from registers; nothing writes these before they have."""
    for chosen in fused_settings(monkeypatch, 90, group_size, layers):
        code = compile_fused(chosen, Variant(90, dtype, group_size))
        assert code.counts["HGMMA"] and code.counts["UTMALDG"], f"{chosen}: {code.summary()}"
        assert "wgmma.wait_group.sync.aligned 0; mov" in code.ptx, f"{chosen}: no wait in the PTX"
        found = overwritten_operands(code.loop)
        assert not found, f"{chosen}: written too early: {found}; {code.summary()}"
        assert not code.loop_spills, f"{chosen}: {code.summary()}"


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_parts_of_tiles_are_stored_as_lanes_hold_them(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through shared memory goes what the counter gave, and the result, in 16 bits."""
    for chosen in fused_settings(monkeypatch, 90, 128, LAYERS):
        code = compile_fused(chosen, Variant(90, dtype))
        stores = [each for each in code.instructions if each.kind == "STS"]
        assert len(stores) == 1, f"{chosen}: {stores}"


@triton.jit
def unguarded_kernel(words_ptr, x_ptr, y_ptr, chunks):
    """One product per chunk, its left operand made in registers, and nothing that waits."""
    row = tl.arange(0, 64)[:, None]
    offset = row * 128 + tl.arange(0, 128)[None, :]
    y = tl.zeros((64, 64), tl.float32)
    for chunk in range(chunks):
        weights = tl.load(words_ptr + chunk * 8192 + offset) & 15
        x = tl.load(x_ptr + chunk * 8192 + offset)
        y = tl.dot(weights.to(tl.bfloat16), tl.trans(x), y)
    tl.store(y_ptr + row * 64 + tl.arange(0, 64)[None, :], y.to(tl.bfloat16))


@pytest.mark.skipif(TRITON_WAITS, reason="this Triton waits by itself")
def test_without_a_wait_operands_are_overwritten() -> None:
    """What `after_tensor_cores` prevents does happen, and the check sees it."""
    options = {"num_warps": 4, "num_stages": 3}
    code = machine_code.compile_kernel(unguarded_kernel, Variant(90), {}, options)
    assert code.counts["HGMMA"] and overwritten_operands(code.loop), code.summary()


def instructions(*lines: str) -> list[Instruction]:
    return [Instruction(*line.split(" ", 1)) for line in lines]


FIRST = "HGMMA.64x64x16.F32.BF16 R24, R84, gdesc[UR16], R24, gsb0"
SECOND = "HGMMA.64x64x16.F32.BF16 R24, R56, gdesc[UR16], R24, gsb0"


@pytest.mark.parametrize(
    ("loop", "found"),
    [
        # A wait for all, before and after the write.
        (["WARPGROUP.DEPBAR.LE gsb0, 0x0", "MOV R84, R1", FIRST], []),
        (["MOV R84, R1", "WARPGROUP.DEPBAR.LE gsb0, 0x0", FIRST], ["0: MOV R84, R1"]),
        # The last of four registers, and the first that is not one.
        (["MOV R87, R1", FIRST], ["0: MOV R87, R1"]),
        (["MOV R88, R1", FIRST], []),
        # Results of several registers; a predicate before the result; a comparison has none.
        (["LDS.128 R81, [R2]", FIRST], ["0: LDS.128 R81, [R2]"]),
        (["LDS.64 R82, [R2]", FIRST], []),
        (["IMAD.WIDE R83, R1, 0x2, R2", FIRST], ["0: IMAD.WIDE R83, R1, 0x2, R2"]),
        (["SHFL.BFLY PT, R84, R1, 0x1, 0x1f", FIRST], ["0: SHFL.BFLY PT, R84, R1, 0x1, 0x1f"]),
        (["ISETP.GE.AND P0, PT, R84, R1, PT", "STS [R84], R84", FIRST], []),
        # One group may be left: the older of the two is done, the other is not.
        ([FIRST, SECOND, "WARPGROUP.DEPBAR.LE gsb0, 0x1", "MOV R84, R1"], []),
        ([FIRST, SECOND, "WARPGROUP.DEPBAR.LE gsb0, 0x1", "MOV R56, R1"], ["3: MOV R56, R1"]),
        # Two instructions of one group are waited for together.
        (
            [FIRST.replace(", gsb0", ""), SECOND, "WARPGROUP.DEPBAR.LE gsb0, 0x1", "MOV R84, R1"],
            ["3: MOV R84, R1"],
        ),
    ],
)
def test_the_check_of_operands(loop: list[str], found: list[str]) -> None:
    assert overwritten_operands(instructions(*loop)) == found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "group_size"), [("bf16", 128), ("fp32", 128), ("bf16", 32)])
def test_the_search_keeps_a_group_in_registers(
    architecture: int, dtype: str, group_size: int
) -> None:
    code = machine_code.compile_search(Variant(architecture, dtype, group_size))
    assert code.spilled_bytes <= SPILLED_BYTES, code.summary()
    # Fused into one rounding, products and sums would give other bytes than on a CPU. (Divisions
    # are made of such instructions.)
    assert "fma.rn.f32" not in code.ptx
