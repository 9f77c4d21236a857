# SPDX-License-Identifier: Apache-2.0
"""Measure how the kernels are best cut up on this GPU, and write the table for its family.

    python -m vllm_nanoquant.kernels.tune --output vllm_nanoquant/kernels/tuning/sm90.json

Shapes are those of Nemotron-Nano-9B-v2 unless `--shapes 4096x14336,...` (N x K) names others. For a
shape that is not in the table the rules in `settings.py` decide. Each candidate's result is
compared with the others'; one that is wrong or does not fit the GPU is left out and named.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vllm_nanoquant.files import write_whole
from vllm_nanoquant.kernels.layout import RuntimeWeight
from vllm_nanoquant.kernels.settings import (
    DecodeLaunch,
    DecodeSettings,
    FusedSettings,
    Gpu,
    gpu_of,
)
from vllm_nanoquant.kernels.timing import copies_needed, time_in_graph
from vllm_nanoquant.quantize.minmax import quantize_minmax

SHAPES = "22656x4480,4480x10240,15680x4480,4480x15680,7168x4480,4480x5120,131072x4480"
GROUP_SIZE = 128
REPLAYS = 9
# Numbers of tokens up to which one setting of `fused` serves.
BUCKETS = (32, 64, 128, 256, 512, 768, 1024)
SHORT = tuple(DecodeLaunch(*each) for each in ((2, 1, 2), (2, 1, 1), (4, 1, 1), (4, 2, 1)))
LONG = tuple(DecodeLaunch(*each) for each in ((2, 1, 1), (4, 1, 1), (2, 1, 2), (2, 2, 1)))
# Rows, tokens, warps, stages, programs per multiprocessor, prefetch, halves.
HOPPER = (
    (64, 32, 4, 4, 3),
    (128, 32, 4, 3, 2, False, False),
    (64, 64, 4, 3, 3),
    (128, 64, 4, 3, 2),
    (64, 128, 4, 3, 2),
    (64, 128, 4, 4, 1),
    (128, 128, 8, 3, 1),
    (128, 256, 8, 3, 1, True),
)
AMPERE = ((64, 32, 4, 2, 3), (128, 32, 4, 2, 2), (128, 32, 4, 3, 1), (128, 64, 8, 2, 1))
# One kernel rather than two and a buffer, unless it is slower by more than the noise.
PREFERENCE = 1.03
# Results that differ by more than this, relative to their mean size, are wrong.
TOLERANCE = 1e-2

Measured = tuple[float, Any]


def decode_candidates(gpu: Gpu, n: int, chunks: int) -> Iterator[tuple[int, int]]:
    """Ways (warps_k, split) to cut K that put 6 to 20 warps of two tiles on a multiprocessor."""
    tiles = math.ceil(n / 32)
    for warps_k, split in product((1, 2, 4), range(1, 17)):
        warps = tiles * warps_k * split / gpu.multiprocessors
        few_rows = split == 1 and warps > 20
        if warps_k * split <= chunks and (6 <= warps <= 20 or few_rows):
            yield warps_k, split


def fused_candidates(gpu: Gpu, up_to: int) -> list[FusedSettings]:
    """Settings of `fused` that may suit a number of tokens."""
    all_settings = HOPPER if gpu.capability[0] == 9 else AMPERE
    suited = [each for each in all_settings if each[1] <= max(32, up_to)]
    if gpu.capability[0] == 9:
        suited = [each for each in suited if each[1] >= min(up_to, 512) / 4]
    return [FusedSettings(up_to, *each) for each in suited]


def decode_pairs(gpu: Gpu, n: int, chunks: int) -> list[tuple[int, DecodeSettings]]:
    """Every candidate for up to 8 tokens (8, settings), and for up to 16 (16, settings)."""
    return [
        (tokens, DecodeSettings(*cut, launch, launch))
        for cut in decode_candidates(gpu, n, chunks)
        for tokens, launches in ((8, SHORT), (16, LONG))
        for launch in launches
    ]


def compile_one(job: tuple[int, DecodeSettings | FusedSettings]) -> None:
    """Compile a candidate by using it on a small weight; errors show when it is measured."""
    from vllm_nanoquant.kernels.decode import decode
    from vllm_nanoquant.kernels.fused import fused

    tokens, settings = job
    weight = small_weight()
    x = torch.zeros((tokens, weight.in_features), dtype=torch.bfloat16, device="cuda")
    try:
        if isinstance(settings, DecodeSettings):
            decode(x, weight, None, settings)
        else:
            fused(x, weight, None, settings)
    except Exception:  # whatever the compiler or the driver raises
        return


def small_weight() -> RuntimeWeight:
    """A weight whose sizes are multiples of 16, as a model's are."""
    dense = torch.ones((256, 4096), dtype=torch.bfloat16, device="cuda")
    return RuntimeWeight.from_quantized(quantize_minmax(dense, GROUP_SIZE))


class Shape:
    """One weight [N, K] with enough copies that no cache holds them."""

    def __init__(self, n: int, k: int) -> None:
        """Make a random weight and its copies on the current GPU."""
        dense = torch.randn((n, k), dtype=torch.bfloat16, device="cuda") * 0.02
        weight = RuntimeWeight.from_quantized(quantize_minmax(dense, GROUP_SIZE))
        self.copies = [weight] + [weight.clone() for _ in range(copies_needed(weight.nbytes) - 1)]
        self.k = k
        self.expected: dict[int, torch.Tensor] = {}

    def measure(
        self, tokens: int, run: Callable[[torch.Tensor, RuntimeWeight], torch.Tensor], name: str
    ) -> float:
        """Microseconds of a candidate; infinite where it fails, or differs from the first one."""
        generator = torch.Generator("cuda").manual_seed(tokens)
        x = torch.randn((tokens, self.k), dtype=torch.bfloat16, device="cuda", generator=generator)
        try:
            y = run(x, self.copies[0]).float()
            expected = self.expected.setdefault(tokens, y)
            error = float((y - expected).abs().mean() / expected.abs().mean())
            if not error <= TOLERANCE:
                raise ValueError(f"differs from other settings by {error:.1e}")
            calls = [lambda weight=weight: run(x, weight) for weight in self.copies]
            return time_in_graph(calls, REPLAYS).median
        except Exception as error:  # out of registers, out of shared memory, wrong
            tqdm.write(f"left out: {name}: {str(error).splitlines()[0][:120]}", file=sys.stderr)
            return math.inf


def tune_decode(gpu: Gpu, shape: Shape, n: int, chunks: int) -> dict[str, Any]:
    """Entry "decode" of a shape: the cut of K with the least product of times at 1, 8, 16.

    The times at 1 and 8 count twice: that is what one or two users of a GPU run, and a cut that
    gains at 16 by losing at 8 would otherwise win.
    """
    from vllm_nanoquant.kernels.decode import decode

    def best(tokens: tuple[int, ...], cut: tuple[int, int], launch: DecodeLaunch) -> float:
        settings = DecodeSettings(*cut, launch, launch)
        times = [
            shape.measure(each, lambda x, w: decode(x, w, None, settings), f"decode {settings}")
            for each in tokens
        ]
        return math.prod(times)

    found: list[tuple[float, dict[str, Any]]] = []
    for cut in decode_candidates(gpu, n, chunks):
        short = min(((best((1, 8), cut, each), index) for index, each in enumerate(SHORT)))
        long = min(((best((16,), cut, each), index) for index, each in enumerate(LONG)))
        entry = {
            "warps_k": cut[0],
            "split": cut[1],
            "up_to_8": asdict(SHORT[short[1]]),
            "up_to_16": asdict(LONG[long[1]]),
        }
        found.append((short[0] ** 2 * long[0], entry))
    return min(found, key=lambda each: each[0])[1]


def tune_fused(gpu: Gpu, shape: Shape) -> list[dict[str, Any]]:
    """Entry "fused" of a shape: the best settings per bucket, while faster than `prefill`."""
    from vllm_nanoquant.kernels.fused import fused
    from vllm_nanoquant.kernels.prefill import prefill

    entries: list[dict[str, Any]] = []
    for bucket in BUCKETS:
        limit = shape.measure(bucket, lambda x, w: prefill(x, w, None), "prefill")
        times: list[tuple[float, FusedSettings]] = []
        for settings in fused_candidates(gpu, bucket):
            run = lambda x, w, s=settings: fused(x, w, None, s)  # noqa: E731
            times.append((shape.measure(bucket, run, f"fused {settings}"), settings))
        time, chosen = min(times, key=lambda each: each[0])
        if time > PREFERENCE * limit and entries:
            break
        if entries and replace(chosen, up_to=0) == FusedSettings(**{**entries[-1], "up_to": 0}):
            entries[-1]["up_to"] = bucket
        else:
            entries.append(asdict(chosen))
    return entries


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """Read "22656x4480,..." as [(22656, 4480), ...], or raise ValueError naming what is wrong."""
    shapes = []
    for part in text.split(","):
        sides = part.lower().split("x")
        if len(sides) != 2 or not all(side.isdigit() and int(side) for side in sides):
            raise ValueError(f"{part!r} is not a shape; write N x K as in 22656x4480")
        shapes.append((int(sides[0]), int(sides[1])))
    return shapes


def main() -> None:
    """Compile all candidates side by side, measure them shape by shape, write the table."""
    parser = argparse.ArgumentParser(description="measure kernel settings on this GPU")
    parser.add_argument("--output", type=Path, required=True, help="JSON file, sm<capability>.json")
    parser.add_argument("--shapes", default=SHAPES, help="N x K, as in 22656x4480,4480x10240")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers side by side")
    options = parser.parse_args()
    try:
        shapes = parse_shapes(options.shapes)
    except ValueError as error:
        parser.error(f"--shapes: {error}")
    if not torch.cuda.is_available():
        parser.error("no NVIDIA GPU: nothing can be measured here")
    gpu = gpu_of(torch.device("cuda", torch.cuda.current_device()))
    jobs = {pair for n, k in shapes for pair in decode_pairs(gpu, n, math.ceil(k / 128))}
    fused_jobs = {(bucket, each) for bucket in BUCKETS for each in fused_candidates(gpu, bucket)}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        work = [*jobs, *fused_jobs]
        list(tqdm(pool.map(compile_one, work), "compiling", len(work)))
    table: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "capability": list(gpu.capability),
        "multiprocessors": gpu.multiprocessors,
        "torch": torch.__version__,
        "shapes": {},
    }
    for n, k in tqdm(shapes, "measuring"):
        shape = Shape(n, k)
        table["shapes"][f"{n}x{k}"] = {
            "decode": tune_decode(gpu, shape, n, math.ceil(k / 128)),
            "fused": tune_fused(gpu, shape),
        }
        del shape
        torch.cuda.empty_cache()
        write_whole(options.output, json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
