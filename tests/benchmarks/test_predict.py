# SPDX-License-Identifier: Apache-2.0
"""The model behind the predictions, with counts written here by hand; nothing is compiled."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.kernels import predict
from benchmarks.kernels.layers import LAYERS, Layer
from benchmarks.kernels.predict import Counts, GpuSpec, Product, parts, predict_us
from vllm_nanoquant.kernels.settings import DecodeLaunch, DecodeSettings

RESULT = Path(predict.__file__).parent / "results" / "predicted.json"
# 1000 GB/s, 10 multiprocessors, 1 GHz.
GPU = GpuSpec("made up", (8, 6), 10, 1.0, 1000.0, 102400, 48)
H200 = next(gpu for gpu in predict.GPUS if gpu.name == "H200")
COUNTS = Counts(registers=128, loop_instructions=400, per_weight=1.5, programs_at_once=4)
PRODUCT = Product(
    memory_bytes=8_750_000,
    cache_bytes=1_400_000,
    programs=80,
    warps=2,
    steps=5,
    adds_up=False,
    counts=COUNTS,
)
# Microseconds of `decode` on one H200 for 1, 8 and 16 tokens, as `decode_rule` has it
# (results/h200-decode-cuts.json).
MEASURED = {
    "in_proj": (16.15, 16.46, 23.86),
    "out_proj": (9.18, 10.12, 13.81),
    "mlp_up": (12.0, 12.48, 16.32),
    "mlp_down": (12.22, 13.29, 17.8),
    "qkv_proj": (6.79, 7.57, 9.82),
    "o_proj": (5.93, 6.57, 9.38),
    "lm_head": (79.46, 80.96, 100.19),
}


def test_each_bound_by_hand() -> None:
    assert parts(GPU, PRODUCT) == pytest.approx(
        {
            # 8.75 MB at 875 GB/s.
            "memory": 10.0,
            # 1.4 MB at 28 bytes per clock and multiprocessor.
            "cache": 5.0,
            # 80 programs, 40 at once: two turns of 5 * 400 instructions, 6 clocks each.
            "latency": 24.0,
            # 80 * 2 * 5 * 400 instructions, 40 per clock.
            "issue": 8.0,
        }
    )


def test_the_greatest_bound_and_the_start_count() -> None:
    assert predict_us(GPU, PRODUCT) == pytest.approx(24.0 + predict.LAUNCH_US)
    split = replace(PRODUCT, adds_up=True)
    assert predict_us(GPU, split) == pytest.approx(24.0 + predict.LAUNCH_US + predict.SPLIT_US)
    large = replace(PRODUCT, memory_bytes=10 * PRODUCT.memory_bytes)
    assert predict_us(GPU, large) == pytest.approx(100.0 + predict.LAUNCH_US)


def test_no_product_is_over_before_one_program_is() -> None:
    few = replace(PRODUCT, programs=3)
    assert parts(GPU, few)["latency"] == pytest.approx(12.0)


@pytest.mark.parametrize("field", ["memory_bytes", "cache_bytes", "programs", "warps", "steps"])
def test_more_work_never_takes_less_time(field: str) -> None:
    times = [
        predict_us(GPU, replace(PRODUCT, **{field: scale * getattr(PRODUCT, field)}))
        for scale in (1, 2, 4, 16, 64)
    ]
    assert times == sorted(times) and times[-1] > times[0]


def test_the_work_of_a_product() -> None:
    chosen = DecodeSettings(2, 3, DecodeLaunch(2, 1, 2), DecodeLaunch(4, 1, 1))
    product = predict.product_of(Layer("small", 1024, 2048), 8, chosen, COUNTS)
    # Half a byte per weight, and a word for each of the groups of 128.
    weight = 1024 * 2048 // 2 + 1024 * 16 * 4
    x, y = 8 * 2048 * 2, 8 * 1024 * 2
    assert product.memory_bytes == weight + x + y
    # 32 programs of rows read x; 3 partial sums in fp32 are written and read.
    assert product.cache_bytes == weight + 32 * x + 2 * 3 * 8 * 1024 * 4 + y
    # 16 chunks, 3 programs of 2 warps.
    assert (product.programs, product.warps, product.steps) == (96, 2, 3)
    assert product.adds_up


def test_bf16_takes_its_bytes() -> None:
    layer = Layer("small", 1000, 3875)
    us = predict.bf16_us(GPU, layer, 1)
    assert us == pytest.approx(2 * (1000 * 3875 + 4875) / 875e3 + predict.LAUNCH_US)


@pytest.fixture(scope="module")
def result() -> dict:
    return json.loads(RESULT.read_text(encoding="utf-8"))


@pytest.mark.parametrize("layer", MEASURED)
def test_the_model_agrees_with_one_h200(layer: str, result: dict) -> None:
    for tokens, measured in zip(predict.TOKENS, MEASURED[layer], strict=True):
        (found,) = [
            row
            for row in result["rows"]
            if (row["gpu"], row["layer"], row["tokens"]) == ("H200", layer, tokens)
        ]
        counts = Counts(**found["counts"])
        again = predict.row(H200, LAYERS[layer], tokens, lambda *_, counts=counts: counts)
        # The counts in the file are of the settings that are in force.
        assert again == found
        error = found["us"] / measured - 1
        assert abs(error) < 0.15, f"{tokens} tokens: {found['us']} us, measured {measured}"


def test_the_file_says_that_all_is_predicted(result: dict) -> None:
    assert result["kind"] == "predicted" and result["triton"]
    assert {row["kind"] for row in result["rows"]} == {"predicted"}
    assert len(result["rows"]) == len(predict.GPUS) * len(LAYERS) * len(predict.TOKENS)
    assert "nothing here was measured" in result["note"]


def test_tables_go_between_their_own_markers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text(f"Before\n{predict.BEGIN}\nold\n{predict.END}\nAfter\n", encoding="utf-8")
    assert predict.main(["--read", str(RESULT), "--check", str(page)]) == 1
    assert "is not up to date" in capsys.readouterr().out
    assert predict.main(["--read", str(RESULT), "--write", str(page)]) == 0
    assert predict.main(["--read", str(RESULT), "--check", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("Before\n") and text.endswith("After\n") and "old" not in text
    assert "`predicted.json`" in text and "**predicted, not measured**" in text
    for gpu in predict.GPUS:
        assert f"{gpu.name}, predicted:" in text
    assert "| in_proj | 22656 x 4480 |" in text


def test_a_file_without_markers_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "README.md"
    page.write_text("nothing", encoding="utf-8")
    with pytest.raises(SystemExit):
        predict.main(["--read", str(RESULT), "--write", str(page)])
    assert "README.md: it needs one line <!-- predicted:begin -->" in capsys.readouterr().err
