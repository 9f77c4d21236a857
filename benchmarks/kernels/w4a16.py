# SPDX-License-Identifier: Apache-2.0
"""Time the W4A16 op beside bf16 cuBLAS on the layers of Nemotron-Nano-9B-v2.

Method: for each layer, enough copies of the weight that one round over them reads at least 256 MB
(no cache holds that), the round captured in a CUDA graph, the median of timed replays divided by
the number of copies. Beside each time stands the error against the fp64 product of the same
weights: mean |y - expected| / mean |expected|.

usage: python3 benchmarks/kernels/w4a16.py --output FILE [--quick]   (the repository root on
PYTHONPATH, a CUDA GPU)
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vllm_nanoquant.kernels.ops import w4a16, warm_up
from vllm_nanoquant.kernels.reference import dequantize
from vllm_nanoquant.quantize.groups import QuantizedWeight
from vllm_nanoquant.quantize.minmax import quantize_minmax

# N, K
LAYERS = {
    "in_proj": (22656, 4480),
    "out_proj": (4480, 10240),
    "mlp_up": (15680, 4480),
    "mlp_down": (4480, 15680),
    "qkv_proj": (7168, 4480),
    "o_proj": (4480, 5120),
    "lm_head": (131072, 4480),
}
TOKENS = (1, 2, 4, 8, 16, 64, 512, 2048)
QUICK_LAYERS = ("in_proj", "mlp_down")
QUICK_TOKENS = (1, 16, 512)
GROUP_SIZE = 128
ROTATED_BYTES = 256 << 20

Call = Callable[[], torch.Tensor]


def microseconds(calls: list[Call], replays: int) -> float:
    """Median time of one call, over replays of a graph that makes each call once."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def error(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> float:
    """Mean |y - expected| / mean |expected| with expected = x [M, K] @ weight [N, K].T in fp64."""
    expected = x.double() @ weight.t()
    return float((y.double() - expected).abs().mean() / expected.abs().mean())


def copies_of(nbytes: int) -> int:
    """Weights of that size that together make at least ROTATED_BYTES."""
    return -(-ROTATED_BYTES // nbytes)


def copy_of(weight: QuantizedWeight) -> QuantizedWeight:
    """The same weight in other memory."""
    return QuantizedWeight(
        weight.packed.clone(),
        weight.scale.clone(),
        weight.zero_point.clone(),
        weight.group_size,
        weight.in_features,
    )


def int4_call(x: torch.Tensor, w: QuantizedWeight) -> Call:
    """Make a call of the op on one of the copies."""
    return lambda: w4a16(x, w.packed, w.scale, w.zero_point, None, w.group_size)


def bf16_call(x: torch.Tensor, w: torch.Tensor) -> Call:
    """Make a call of cuBLAS on one of the copies."""
    return lambda: torch.nn.functional.linear(x, w)


def measure_layer(name: str, tokens: tuple[int, ...], replays: int) -> list[dict[str, Any]]:
    """One result per number of tokens for one layer."""
    n, k = LAYERS[name]
    dense = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02
    weight = quantize_minmax(dense, GROUP_SIZE)
    warm_up(weight.packed, weight.scale, weight.zero_point, None, k, GROUP_SIZE)
    int4 = [copy_of(weight) for _ in range(copies_of(weight.nbytes))]
    bf16 = [dense.clone() for _ in range(copies_of(dense.nbytes))]
    exact = dequantize(
        weight.packed, weight.scale, weight.zero_point, k, GROUP_SIZE, dtype=torch.float64
    )
    results = []
    for m in tokens:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        ours = [int4_call(x, each) for each in int4]
        peer = [bf16_call(x, each) for each in bf16]
        result: dict[str, Any] = {
            "layer": name,
            "n": n,
            "k": k,
            "tokens": m,
            "w4a16_us": round(microseconds(ours, replays), 2),
            "w4a16_error": error(ours[0](), x, exact),
            "bf16_us": round(microseconds(peer, replays), 2),
            "bf16_error": error(peer[0](), x, dense.double()),
        }
        result["speedup"] = round(result["bf16_us"] / result["w4a16_us"], 2)
        result["w4a16_gb_per_s"] = round(weight.nbytes / result["w4a16_us"] / 1e3)
        results.append(result)
        print(
            f"{name:9} M={m:<5} w4a16 {result['w4a16_us']:8.1f} us (error "
            f"{result['w4a16_error']:.1e}, {result['w4a16_gb_per_s']} GB/s)   bf16 "
            f"{result['bf16_us']:8.1f} us (error {result['bf16_error']:.1e})   "
            f"{result['speedup']:.2f}x",
            flush=True,
        )
    return results


def main() -> None:
    """Measure, print a line per figure, and write the JSON file."""
    parser = argparse.ArgumentParser(description="W4A16 kernels beside bf16 cuBLAS")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="two layers, three batch sizes")
    options = parser.parse_args()
    torch.manual_seed(0)
    layers = QUICK_LAYERS if options.quick else tuple(LAYERS)
    tokens = QUICK_TOKENS if options.quick else TOKENS
    replays = 5 if options.quick else 15
    results = [each for name in layers for each in measure_layer(name, tokens, replays)]
    properties = torch.cuda.get_device_properties(0)
    report = {
        "problem": {
            "what": "y [M, N] = x [M, K] bf16 times an int4 weight [N, K]; microseconds per call",
            "model": "Nemotron-Nano-9B-v2",
            "group_size": GROUP_SIZE,
            "rotated_bytes": ROTATED_BYTES,
            "replays": replays,
            "error": "mean |y - expected| / mean |expected|, expected in fp64",
        },
        "device": {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        },
        "packages": {name: version(name) for name in ("torch", "triton")},
        "results": results,
    }
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
