# SPDX-License-Identifier: Apache-2.0
"""Measure how the kernels are best cut up on this GPU, and write the table for its family.

    python -m vllm_nanoquant.kernels.tune --output vllm_nanoquant/kernels/tuning/sm90.json

Shapes are those of Nemotron-Nano-9B-v2 unless `--shapes 4096x14336,...` (N x K) names others. For a
shape that is not in the table the rules in `settings.py` decide. Each candidate's result is
compared with `prefill`'s; one that is wrong or does not fit the GPU is left out and named. Shapes
that the file has from this kind of GPU stay in it, so a run may be stopped and taken up again.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeVar

import torch
from tqdm import tqdm

from vllm_nanoquant.files import write_whole
from vllm_nanoquant.kernels.accuracy import mean_relative_error
from vllm_nanoquant.kernels.layout import RuntimeWeight
from vllm_nanoquant.kernels.settings import (
    FUSED_LIMIT,
    QUARTERS,
    REGISTERS,
    DecodeLaunch,
    DecodeSettings,
    FusedSettings,
    Gpu,
    cuts,
    decode_rule,
    gpu_of,
    read_table,
)
from vllm_nanoquant.kernels.timing import copies_needed, time_in_graph, warm_up_for
from vllm_nanoquant.quantize.minmax import quantize_minmax

SHAPES = "22656x4480,4480x10240,15680x4480,4480x15680,7168x4480,4480x5120,131072x4480"
GROUP_SIZE = 128
REPLAYS = 9
# Numbers of tokens up to which one setting of `fused` serves.
BUCKETS = (32, 64, 128, 256, 512, 768, 1024, FUSED_LIMIT)
# (tiles, chunks ahead): registers per thread without which it spills, and those it has use for.
SHORT = {(2, 2): (104, 144), (2, 1): (80, 120), (4, 1): (128, 184), (4, 2): (208, 248)}
LONG = {(2, 1): (128, 152), (2, 2): (152, 168), (4, 1): (208, 216)}
# Cuts are measured that leave no multiprocessor with more work than this times the mean.
IMBALANCE = 1.22
# Launches for up to 16 tokens are measured for cuts within this factor of the best up to 8.
WORTH_MORE = 1.1
# Rows, tokens, warps, stages, programs per multiprocessor, prefetch.
HOPPER = (
    (64, 32, 4, 4, 4),
    (64, 32, 4, 5, 3),
    (128, 32, 4, 3, 2),
    (64, 64, 4, 3, 3),
    (64, 64, 4, 4, 2),
    (64, 64, 4, 5, 2),
    (128, 64, 8, 3, 2),
    (64, 128, 4, 3, 2),
    (64, 128, 4, 4, 1),
    (64, 128, 4, 5, 1),
    (128, 128, 8, 3, 1),
    (128, 128, 8, 4, 1),
    (128, 256, 8, 3, 1, True),
)
AMPERE = ((64, 32, 4, 2, 3), (128, 32, 4, 2, 2), (128, 32, 4, 3, 1), (128, 64, 8, 2, 1))
# What is within this factor of the least time is measured so many times more, in turns: one time
# alone is uncertain by a few percent.
CLOSE = 1.04
TURNS = 2
# How often the times at so many tokens count for a cut: 1 and 8 twice, because that is what one or
# two users of a GPU run, and a cut that gains at 16 by losing at 8 would otherwise win.
WEIGHTS = {1: 2, 8: 2, 16: 1}
# One kernel rather than two and a buffer, unless it is slower by more than the noise.
PREFERENCE = 1.03
# Results that differ by more than this, relative to their mean size, are wrong.
TOLERANCE = 1e-2

Kinds = dict[tuple[int, int], tuple[int, int]]
T = TypeVar("T")


def decode_candidates(gpu: Gpu, n: int, chunks: int) -> list[tuple[int, int]]:
    """Ways (warps_k, split) to cut K that share the work out evenly.

    With two tiles per warp a multiprocessor gets 8 to 27 warps, more only where there are so many
    rows, and none has much more than the mean to do. Where no cut is like that, as with a small
    weight, the rule's.
    """
    work = IMBALANCE * math.ceil(n / 32) * chunks
    found = [
        (each.warps_k, each.split)
        for each in cuts(gpu, n, chunks, warps_per_program=(1, 2, 4), most_parts=24)
        if each.warps * each.steps * gpu.multiprocessors <= work
        and each.warps >= 8
        and (each.warps <= 27 or each.split == 1)
    ]
    rule = decode_rule(gpu, n, chunks)
    return found or [(rule.warps_k, rule.split)]


def fused_candidates(gpu: Gpu, up_to: int) -> list[FusedSettings]:
    """Settings of `fused` that may suit a number of tokens."""
    every, least = (HOPPER, min(up_to, 512) / 4) if gpu.is_hopper else (AMPERE, 0)
    return [FusedSettings(up_to, *each) for each in every if least <= each[1] <= max(32, up_to)]


def share_registers(gpu: Gpu, programs: int, warps: int, least: int, most: int) -> int:
    """Registers per thread with which a multiprocessor holds its share of the programs, no more.

    A GPU does not deal programs out evenly where more fit, and some multiprocessors then have more
    to do than others. `least` is what the kernel needs, `most` what it has use for. Where fewer
    than its share fit, they run one after the other anyway, and `most` it is.
    """
    share = -(-programs // gpu.multiprocessors)
    warps_per_quarter = -(-share * warps // QUARTERS)
    registers = REGISTERS // QUARTERS // (32 * warps_per_quarter) // 8 * 8
    return min(registers, most) if registers >= least else most


def decode_launches(gpu: Gpu, n: int, cut: tuple[int, int], kinds: Kinds) -> list[DecodeLaunch]:
    """Ways to run a cut: each kind with registers for a multiprocessor's share, and with `most`."""
    launches = []
    for (tiles, prefetch), (least, most) in kinds.items():
        programs = math.ceil(n / (16 * tiles)) * cut[1]
        share = share_registers(gpu, programs, cut[0], least, most)
        launches += [DecodeLaunch(tiles, 1, prefetch, each) for each in sorted({share, most})]
    return launches


def decode_pairs(gpu: Gpu, n: int, chunks: int) -> list[tuple[int, DecodeSettings]]:
    """Every candidate for up to 8 tokens (8, settings), and for up to 16 (16, settings)."""
    return [
        (tokens, DecodeSettings(*cut, launch, launch))
        for cut in decode_candidates(gpu, n, chunks)
        for tokens, kinds in ((8, SHORT), (16, LONG))
        for launch in decode_launches(gpu, n, cut, kinds)
    ]


def compile_one(job: tuple[int, DecodeSettings | FusedSettings]) -> None:
    """Compile a candidate by using it on a small weight; what fails shows when it is measured."""
    from vllm_nanoquant.kernels.decode import decode
    from vllm_nanoquant.kernels.fused import fused

    tokens, settings = job
    try:
        weight = small_weight()
        x = torch.zeros((tokens, weight.in_features), dtype=torch.bfloat16, device="cuda")
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
        """Microseconds of a candidate; infinite where it fails, or differs from `prefill`."""
        generator = torch.Generator("cuda").manual_seed(tokens)
        x = torch.randn((tokens, self.k), dtype=torch.bfloat16, device="cuda", generator=generator)
        try:
            error = self._error(run(x, self.copies[0]), x)
            if not error <= TOLERANCE:
                raise ValueError(f"differs from the dequantized weight's product by {error:.1e}")
            calls = [lambda weight=weight: run(x, weight) for weight in self.copies]
            return time_in_graph(calls, REPLAYS, warm_up_for(tokens)).median
        except Exception as error:  # out of registers, out of shared memory, wrong
            tqdm.write(f"left out: {name}: {str(error).splitlines()[0][:120]}", file=sys.stderr)
            return math.inf

    def _error(self, y: torch.Tensor, x: torch.Tensor) -> float:
        """Mean relative error of a result, beside that of `prefill`."""
        from vllm_nanoquant.kernels.prefill import prefill

        if len(x) not in self.expected:
            self.expected[len(x)] = prefill(x, self.copies[0], None).float()
        return mean_relative_error(y, self.expected[len(x)])


def fastest(candidates: Iterable[T], measure: Callable[[T], float]) -> tuple[float, T]:
    """Time of the fastest candidate, and which it is.

    Those within CLOSE of the least time are measured again, in turns, and their medians count.
    """
    times = {each: [measure(each)] for each in candidates}
    limit = CLOSE * min(first for (first,) in times.values())
    close = [each for each, (first,) in times.items() if first <= limit]
    if len(close) > 1 and limit < math.inf:
        for each in close * TURNS:
            times[each].append(measure(each))
    best = min(close, key=lambda each: median(times[each]))
    return median(times[best]), best


def tune_decode(gpu: Gpu, shape: Shape, n: int, chunks: int) -> dict[str, Any] | None:
    """Entry "decode" of a shape: the cut of K with the least mean of times, as WEIGHTS has it.

    None where nothing could be run.
    """
    from vllm_nanoquant.kernels.decode import decode

    def mean(settings: DecodeSettings, *tokens: int) -> float:
        """Geometric mean of the times at some of the numbers of tokens of WEIGHTS."""
        run = lambda x, w: decode(x, w, None, settings)  # noqa: E731
        times = [shape.measure(each, run, f"decode {settings}") ** WEIGHTS[each] for each in tokens]
        return math.prod(times) ** (1 / sum(WEIGHTS[each] for each in tokens))

    def candidates(cut: tuple[int, int], kinds: Kinds) -> list[DecodeSettings]:
        launches = decode_launches(gpu, n, cut, kinds)
        return [DecodeSettings(*cut, launch, launch) for launch in launches]

    short: dict[tuple[int, int], tuple[float, DecodeSettings]] = {}
    for cut in decode_candidates(gpu, n, chunks):
        times = [(mean(each, 1, 8), each) for each in candidates(cut, SHORT)]
        short[cut] = min(times, key=lambda each: each[0])
    limit = min(time for time, _ in short.values()) * WORTH_MORE
    found = []
    for cut, (time, settings) in short.items():
        if time <= limit:
            _, long = fastest(candidates(cut, LONG), lambda each: mean(each, 16))
            found.append(replace(settings, up_to_16=long.up_to_16))
    time, best = fastest(found, lambda each: mean(each, *WEIGHTS))
    return asdict(best) if time < math.inf else None


def tune_fused(gpu: Gpu, shape: Shape) -> list[dict[str, Any]]:
    """Entry "fused" of a shape: the best settings per bucket, while faster than `prefill`.

    Empty where nothing could be run.
    """
    from vllm_nanoquant.kernels.fused import fused
    from vllm_nanoquant.kernels.prefill import prefill

    def measure(settings: FusedSettings) -> float:
        run = lambda x, w: fused(x, w, None, settings)  # noqa: E731
        return shape.measure(settings.up_to, run, f"fused {settings}")

    entries: list[dict[str, Any]] = []
    for bucket in BUCKETS:
        limit = shape.measure(bucket, lambda x, w: prefill(x, w, None), "prefill")
        time, chosen = fastest(fused_candidates(gpu, bucket), measure)
        if time == math.inf or (time > PREFERENCE * limit and entries):
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


def table_to_extend(path: Path, gpu: Gpu) -> dict[str, Any]:
    """The table that is written, with the shapes that `path` has from such a GPU."""
    table: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "capability": list(gpu.capability),
        "multiprocessors": gpu.multiprocessors,
        "torch": torch.__version__,
        "shapes": {},
    }
    if path.exists():
        before = read_table(path)
        same = all(before[name] == table[name] for name in ("capability", "multiprocessors"))
        table["shapes"] = before["shapes"] if same else {}
    return table


class Task(NamedTuple):
    """What the command line asks for."""

    output: Path
    shapes: list[tuple[int, int]]
    jobs: int
    gpu: Gpu
    table: dict[str, Any]


def parse_arguments() -> Task:
    """Read the command line; what is wrong ends the program before anything slow."""
    parser = argparse.ArgumentParser(description="measure kernel settings on this GPU")
    parser.add_argument("--output", type=Path, required=True, help="JSON file, sm<capability>.json")
    parser.add_argument("--shapes", default=SHAPES, help="N x K, as in 22656x4480,4480x10240")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers side by side")
    options = parser.parse_args()
    try:
        shapes = parse_shapes(options.shapes)
    except ValueError as error:
        parser.error(f"--shapes: {error}")
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: at least 1")
    if not options.output.parent.is_dir():
        parser.error(f"--output {options.output}: there is no folder {options.output.parent}")
    if not torch.cuda.is_available():
        parser.error("no NVIDIA GPU: nothing can be measured here")
    gpu = gpu_of(torch.device("cuda", torch.cuda.current_device()))
    if options.output.name != f"{gpu.family}.json":
        parser.error(
            f"--output {options.output}: settings for this GPU are looked for in {gpu.family}.json"
        )
    try:
        table = table_to_extend(options.output, gpu)
    except ValueError as error:
        parser.error(f"--output: {error}")
    return Task(options.output, shapes, options.jobs, gpu, table)


def main() -> None:
    """Compile all candidates side by side, measure them shape by shape, write the table."""
    output, shapes, jobs, gpu, table = parse_arguments()
    decode_work = {pair for n, k in shapes for pair in decode_pairs(gpu, n, math.ceil(k / 128))}
    fused_work = {(bucket, each) for bucket in BUCKETS for each in fused_candidates(gpu, bucket)}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        work = [*decode_work, *fused_work]
        list(tqdm(pool.map(compile_one, work), "compiling", len(work)))
    for n, k in tqdm(shapes, "measuring"):
        shape = Shape(n, k)
        found = {
            "decode": tune_decode(gpu, shape, n, math.ceil(k / 128)),
            "fused": tune_fused(gpu, shape),
        }
        # Where nothing could be run the rule decides, as for a shape that is not there.
        table["shapes"][f"{n}x{k}"] = {kernel: entry for kernel, entry in found.items() if entry}
        del shape
        torch.cuda.empty_cache()
        write_whole(output, json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
