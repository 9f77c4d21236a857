# SPDX-License-Identifier: Apache-2.0
"""Predict the decode kernel's times on GPUs that we do not have, from its machine code.

    python benchmarks/kernels/predict.py --output benchmarks/kernels/results/predicted.json
    python benchmarks/kernels/predict.py --read RESULT.json --write docs/benchmarks.md

**These are predictions. Nothing was measured on the RTX 3090, the RTX 4090 or the A10G.** A product
takes the longest of four times, plus what it costs to start:

- memory: bytes of the weight, x and y, over the bandwidth that is attainable of the data sheet's;
- cache: bytes that multiprocessors read from the second-level cache. Beside the weight that is x,
  once for each program of rows, and the partial sums;
- latency: a warp issues an instruction of the main loop every so many clocks, waiting for operands
  in between. So many programs run at once as registers and shared memory allow; where there are
  more, the others wait for their turn;
- issue: 4 instructions per clock and multiprocessor.

Instructions, registers and shared memory are counted in the code that Triton makes for the GPU's
architecture (`machine_code.py`), with the settings of `decode_rule`. The five constants below are
fitted to 21 measurements on one H200 (CUDA graph, weights in no cache; 7 layers, 1, 8 and 16
tokens), so that the model agrees with these proves little about another GPU;
`tests/benchmarks/test_predict.py` keeps it within 15 % of them. The other GPUs have the same
constants, and clocks and bandwidths as their data sheets give them.

Left out: clocks under load and power limits (an A10G of 150 W will not keep its boost clock),
weights that the second-level cache holds (the RTX 4090's 72 MB hold any layer but the head),
refresh of memory, and whatever differs in caches and latencies between the H200 and the others.
BF16 is predicted from its bytes alone with the same attainable bandwidth; on the H200 cuBLAS gets
0.66 to 0.89 of the data sheet's. The kernels for more than 16 tokens are not predicted: there the
time is that of tensor cores and shared memory, which these counts do not describe.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common import output_file, write_json
from benchmarks.kernels.layers import GROUP_SIZE, LAYERS, MODEL, Layer
from benchmarks.kernels.sections import format_us, markdown_table
from benchmarks.kernels.table import add_markdown_files, tell_stale, update
from vllm_nanoquant.kernels.layout import BLOCK, CHUNK, TILE, TILE_WORDS, padded
from vllm_nanoquant.kernels.settings import DecodeSettings, Gpu, decode_rule

TOKENS = (1, 8, 16)
BEGIN = "<!-- predicted:begin -->"
END = "<!-- predicted:end -->"
LABEL = "predicted"

MEMORY_SHARE = 0.875
"""Attainable share of the memory bandwidth of the data sheet."""
CACHE_BYTES_PER_CLOCK = 28.0
"""What a multiprocessor reads per clock from the second-level cache."""
CLOCKS_PER_INSTRUCTION = 6.0
"""Clocks from one instruction of a warp to the next."""
LAUNCH_US = 2.25
"""Microseconds from the start of a kernel to full bandwidth, and from there to its end."""
SPLIT_US = 0.75
"""Microseconds more where programs add up their sums through memory."""
ISSUED_PER_CLOCK = 4
"""Instructions that a multiprocessor starts per clock: one per scheduler."""


@dataclass(frozen=True)
class GpuSpec:
    """Figures of a data sheet.

    Attributes:
        name: of the GPU.
        capability: (8, 6) for SM86.
        multiprocessors: their number.
        clock_ghz: boost clock.
        bandwidth: of the memory, GB/s.
        shared_bytes: shared memory of a multiprocessor.
        warps: that a multiprocessor runs at once at most.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    clock_ghz: float
    bandwidth: float
    shared_bytes: int
    warps: int

    @property
    def architecture(self) -> int:
        """86 for SM86."""
        return 10 * self.capability[0] + self.capability[1]


GPUS = (
    GpuSpec("RTX 3090", (8, 6), 82, 1.695, 936.0, 102400, 48),
    GpuSpec("RTX 4090", (8, 9), 128, 2.52, 1008.0, 102400, 48),
    GpuSpec("A10G", (8, 6), 80, 1.71, 600.0, 102400, 48),
    GpuSpec("H200", (9, 0), 132, 1.98, 4800.0, 233472, 64),
)


@dataclass(frozen=True)
class Counts:
    """What `machine_code.py` counts of one compiled kernel.

    Attributes:
        registers: per thread.
        loop_instructions: that a warp runs per step along K.
        per_weight: instructions of all lanes per weight.
        programs_at_once: per multiprocessor.
    """

    registers: int
    loop_instructions: int
    per_weight: float
    programs_at_once: int


@dataclass(frozen=True)
class Product:
    """The work of one product.

    Attributes:
        memory_bytes: that come from and go to memory.
        cache_bytes: that multiprocessors exchange with the second-level cache.
        programs: that are started.
        warps: per program.
        steps: turns of the main loop of each warp.
        adds_up: whether programs add up their sums.
        counts: of the kernel.
    """

    memory_bytes: int
    cache_bytes: int
    programs: int
    warps: int
    steps: int
    adds_up: bool
    counts: Counts


Compile = Callable[[GpuSpec, DecodeSettings, int], Counts]


def weight_bytes(layer: Layer) -> int:
    """Bytes of words and scales in groups of 128."""
    blocks, chunks = padded(layer.n, layer.k, 0)
    return blocks * chunks * (BLOCK // TILE * TILE_WORDS * 4 + BLOCK * CHUNK // GROUP_SIZE * 4)


def product_of(layer: Layer, tokens: int, chosen: DecodeSettings, counts: Counts) -> Product:
    """The work of `decode` for x [tokens, K] with the settings chosen."""
    chunks = padded(layer.n, layer.k, 0)[1]
    launch = chosen.launch(tokens)
    row_programs = -(-layer.n // (TILE * launch.tiles * launch.warps_n))
    x_bytes, y_bytes = 2 * tokens * layer.k, 2 * tokens * layer.n
    # Partial sums in fp32 are written and read once.
    partial_bytes = 2 * 4 * chosen.split * tokens * layer.n if chosen.split > 1 else 0
    weight = weight_bytes(layer)
    return Product(
        memory_bytes=weight + x_bytes + y_bytes,
        cache_bytes=weight + row_programs * x_bytes + partial_bytes + y_bytes,
        programs=row_programs * chosen.split,
        warps=launch.warps_n * chosen.warps_k,
        steps=-(-chunks // (chosen.warps_k * chosen.split)),
        adds_up=chosen.split > 1,
        counts=counts,
    )


def parts(gpu: GpuSpec, product: Product) -> dict[str, float]:
    """Microseconds that each bound asks for; the greatest counts."""
    clocks_per_us = gpu.clock_ghz * 1e3
    per_warp = product.steps * product.counts.loop_instructions
    turns = product.programs / (gpu.multiprocessors * product.counts.programs_at_once)
    everything = per_warp * product.warps * product.programs
    return {
        "memory": memory_us(gpu, product.memory_bytes),
        "cache": product.cache_bytes
        / (gpu.multiprocessors * CACHE_BYTES_PER_CLOCK * clocks_per_us),
        # A multiprocessor takes the next program as soon as one is done, so turns are no whole
        # numbers; but no product is over before one program is.
        "latency": max(1.0, turns) * per_warp * CLOCKS_PER_INSTRUCTION / clocks_per_us,
        "issue": everything / (gpu.multiprocessors * ISSUED_PER_CLOCK * clocks_per_us),
    }


def memory_us(gpu: GpuSpec, nbytes: int) -> float:
    """Microseconds to move so many bytes from or to memory."""
    return nbytes / (gpu.bandwidth * 1e3 * MEMORY_SHARE)


def predict_us(gpu: GpuSpec, product: Product) -> float:
    """Microseconds of one product."""
    return max(parts(gpu, product).values()) + LAUNCH_US + SPLIT_US * product.adds_up


def bf16_us(gpu: GpuSpec, layer: Layer, tokens: int) -> float:
    """Microseconds of the product with a weight in bf16, from its bytes alone."""
    nbytes = 2 * (layer.n * layer.k + tokens * (layer.n + layer.k))
    return memory_us(gpu, nbytes) + LAUNCH_US


def compiled_counts(gpu: GpuSpec, chosen: DecodeSettings, tokens: int) -> Counts:
    """Counts of the decode kernel that Triton makes for this GPU: bf16, groups of 128."""
    # Not at the top: the model itself needs no Triton.
    from benchmarks.kernels.machine_code import Variant, compile_decode

    code = compile_decode(chosen, tokens, Variant(gpu.architecture, group_size=GROUP_SIZE))
    return Counts(
        registers=code.registers,
        loop_instructions=len(code.loop),
        per_weight=code.per_weight,
        programs_at_once=code.programs_at_once(gpu.shared_bytes, gpu.warps),
    )


def row(
    gpu: GpuSpec, layer: Layer, tokens: int, count: Compile = compiled_counts
) -> dict[str, Any]:
    """One prediction, as it goes into the result file."""
    chunks = padded(layer.n, layer.k, 0)[1]
    chosen = decode_rule(Gpu(gpu.capability, gpu.multiprocessors), layer.n, chunks)
    product = product_of(layer, tokens, chosen, count(gpu, chosen, tokens))
    bounds = parts(gpu, product)
    return {
        "kind": LABEL,
        "gpu": gpu.name,
        "layer": layer.name,
        "n": layer.n,
        "k": layer.k,
        "tokens": tokens,
        "us": round(predict_us(gpu, product), 2),
        "bf16_us": round(bf16_us(gpu, layer, tokens), 2),
        "bound_by": max(bounds, key=lambda bound: bounds[bound]),
        "bounds_us": {bound: round(us, 2) for bound, us in bounds.items()},
        "settings": asdict(chosen.launch(tokens))
        | {"warps_k": chosen.warps_k, "split": chosen.split},
        "counts": asdict(product.counts) | {"per_weight": round(product.counts.per_weight, 3)},
        "memory_bytes": product.memory_bytes,
    }


def predict_all() -> dict[str, Any]:
    """The whole result: every GPU, layer and number of tokens."""
    import triton

    return {
        "kind": LABEL,
        "note": "Predicted from machine code and data sheets; nothing here was measured. The "
        "constants are fitted to one H200.",
        "model": MODEL,
        "group_size": GROUP_SIZE,
        "triton": triton.__version__,
        "constants": {
            "memory_share": MEMORY_SHARE,
            "cache_bytes_per_clock": CACHE_BYTES_PER_CLOCK,
            "clocks_per_instruction": CLOCKS_PER_INSTRUCTION,
            "launch_us": LAUNCH_US,
            "split_us": SPLIT_US,
        },
        "gpus": [asdict(gpu) for gpu in GPUS],
        "rows": [
            row(gpu, layer, tokens)
            for gpu in GPUS
            for layer in LAYERS.values()
            for tokens in TOKENS
        ],
    }


def section(result: dict[str, Any], name: str) -> str:
    """The predictions as Markdown, a table per GPU; `name` is the result file's."""
    lines = [
        f"Made by `benchmarks/kernels/predict.py` from `{name}` (Triton {result['triton']}): "
        f"**predicted, not measured**, from machine code and data sheets, for {result['model']} "
        f"in groups of {result['group_size']}. Constants are fitted to one H200.",
        "",
        "Microseconds: ours / BF16.",
    ]
    for gpu in result["gpus"]:
        rows = [each for each in result["rows"] if each["gpu"] == gpu["name"]]
        lines += ["", f"{gpu['name']}, predicted:", "", *_gpu_table(rows)]
    return "\n".join(lines)


def _gpu_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One GPU's predictions, a row per layer."""
    cells: dict[str, list[str]] = {}
    for each in rows:
        start = [each["layer"], f"{each['n']} x {each['k']}"]
        times = f"{format_us(each['us'])} / {format_us(each['bf16_us'])}"
        cells.setdefault(each["layer"], start).append(times)
    tokens = sorted({each["tokens"] for each in rows})
    head = [f"{number} token{'' if number == 1 else 's'}" for number in tokens]
    return markdown_table(["layer", "N x K", *head], list(cells.values()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--read", type=Path, metavar="JSON", help="predictions made before")
    parser.add_argument(
        "--output", type=output_file, metavar="JSON", help="where to write predictions"
    )
    add_markdown_files(parser)
    options = parser.parse_args(arguments)
    try:
        result = json.loads(options.read.read_text("utf-8")) if options.read else predict_all()
        if options.output:
            write_json(options.output, result)
        source = options.read or options.output
        text = section(result, source.name if source else "no file")
        files = [*options.check, *options.write]
        if not files:
            print(text)
        fresh = {path: update(path, text, bool(options.write), (BEGIN, END)) for path in files}
    except (OSError, ValueError) as error:
        parser.error(str(error))
    except (AttributeError, LookupError, TypeError) as error:
        if not options.read:  # no file is to blame
            raise
        parser.error(f"{options.read} is not a result of predict.py: {error!r}")
    return tell_stale(fresh, options)


if __name__ == "__main__":
    sys.exit(main())
