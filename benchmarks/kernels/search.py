# SPDX-License-Identifier: Apache-2.0
"""Seconds that quantizing takes on a GPU: min-max, and the search with and without its kernel.

    python benchmarks/kernels/search.py --output benchmarks/kernels/results/NAME-search.json

Random weights of Nemotron-Nano-9B-v2's layers. The bytes of the two searches are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common import NO_GPU, output_file, write_json
from benchmarks.kernels.layers import LAYERS
from vllm_nanoquant.quantize import mse
from vllm_nanoquant.quantize.groups import QuantizedWeight
from vllm_nanoquant.quantize.minmax import quantize_minmax

REPEATS = 5
GROUP_SIZE = 128


def seconds(work: Callable[[], QuantizedWeight]) -> list[float]:
    """Times of a few calls, after one that compiles."""
    found = []
    work()
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return found


def without_kernel(weight: torch.Tensor) -> QuantizedWeight:
    """The search in plain PyTorch, which is the kernel's reference."""
    widths, mse.KERNEL_WIDTHS = mse.KERNEL_WIDTHS, ()
    try:
        return mse.quantize_mse(weight, GROUP_SIZE)
    finally:
        mse.KERNEL_WIDTHS = widths


def measure(rows: int, columns: int) -> dict[str, Any]:
    """Times of one weight, in nanoseconds per weight, and whether both searches agree."""
    weight = torch.randn(rows, columns, device="cuda").bfloat16()
    ways: dict[str, Callable[[], QuantizedWeight]] = {
        "minmax": lambda: quantize_minmax(weight, GROUP_SIZE),
        "mse": lambda: mse.quantize_mse(weight, GROUP_SIZE),
        "mse_without_kernel": lambda: without_kernel(weight),
    }
    times = {name: [1e9 * t / weight.numel() for t in seconds(way)] for name, way in ways.items()}
    one, other = ways["mse"](), ways["mse_without_kernel"]()
    same = all(
        torch.equal(getattr(one, name).view(torch.uint8), getattr(other, name).view(torch.uint8))
        for name in ("packed", "scale", "zero_point")
    )
    return {
        "n": rows,
        "k": columns,
        "same_bytes": same,
        "ns_per_weight": {
            name: {"median": statistics.median(t), "min": min(t), "max": max(t)}
            for name, t in times.items()
        },
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=output_file, required=True, help="JSON file to write")
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS)[:4])
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error(NO_GPU)
    report = {
        "problem": {"group_size": GROUP_SIZE, "repeats": REPEATS},
        "device": torch.cuda.get_device_name(),
        "packages": {"torch": torch.__version__},
        "results": {name: measure(LAYERS[name].n, LAYERS[name].k) for name in arguments.layers},
    }
    write_json(arguments.output, report)
    print(json.dumps(report["results"], indent=1))


if __name__ == "__main__":
    main()
