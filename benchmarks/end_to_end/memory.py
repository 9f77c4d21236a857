# SPDX-License-Identifier: Apache-2.0
"""Start one engine on a GPU, and set what vLLM says of its memory beside what the planner says.

    python benchmarks/end_to_end/memory.py --output benchmarks/end_to_end/results/NAME.json

Dummy weights, CUDA graphs, and by default the settings of a server on a small GPU: forward passes
of 2048 tokens, 8 sequences. vLLM's figures are those that it logs, by the first rank to log them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common import geometry_folder, output_file, positive, versions, write_json
from benchmarks.end_to_end.processes import (
    MODEL_GIB,
    PEAK_GIB,
    end_engine,
    end_engines_when_terminated,
    logged,
    logging_environment,
    start_engine,
)
from benchmarks.end_to_end.run import GEOMETRY
from vllm_nanoquant.planner.fit import fit
from vllm_nanoquant.planner.numbers import GIB, MIB
from vllm_nanoquant.planner.settings import Settings, caching_of, installed_vllm
from vllm_nanoquant.planner.source import read_facts
from vllm_nanoquant.planner.weights import Ranks
from vllm_nanoquant.recipe import METHOD, Preset, Recipe

ENGINE = """
import json, sys
if __name__ == "__main__":
    from vllm import LLM
    llm = LLM(**json.loads(sys.argv[1]))
    cache = llm.llm_engine.vllm_config.cache_config
    print("RESULT " + json.dumps({"blocks": cache.num_gpu_blocks}), flush=True)
"""
LOGGED = {
    "model_gib": MODEL_GIB,
    "peak_while_loading_gib": PEAK_GIB,
    "block_tokens": r"Setting attention block size to (\d+) tokens",
    "graphs_estimated_gib": r"Estimated CUDA graph memory: ([\d.]+) GiB",
    "cache_gib": r"Available KV cache memory: ([\d.]+) GiB",
    "cache_tokens": r"GPU KV cache size: ([\d,]+) tokens",
    "concurrency": r"Maximum concurrency for [\d,]+ tokens per request: ([\d.,]+)x",
    "total_gib": r"Free memory on device \([\d.]+/([\d.]+) GiB\)",
    "free_gib": r"Free memory on device \(([\d.]+)/",
    "budget_gib": r"Desired GPU memory utilization is \([\d.]+, ([\d.]+) GiB\)",
    "activations_gib": r"([\d.]+) GiB for peak activation",
    "outside_torch_gib": r"([\d.]+) GiB for non-torch memory",
    "graphs_gib": r"([\d.]+) GiB for CUDAGraph memory",
}


def run_engine(arguments: argparse.Namespace, log: Path) -> dict[str, Any]:
    """Start the engine that the arguments describe, and gather what it logged."""
    engine: dict[str, Any] = {
        "model": str(arguments.geometry),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": arguments.max_model_len,
        "max_num_seqs": arguments.max_num_seqs,
        "max_num_batched_tokens": arguments.max_num_batched_tokens,
        "tensor_parallel_size": arguments.tensor_parallel_size,
        "gpu_memory_utilization": arguments.gpu_memory_utilization,
        "enable_prefix_caching": False,
    }
    if arguments.preset != "bf16":
        engine["quantization"] = METHOD
        engine["hf_overrides"] = {"quantization_config": {"preset": arguments.preset}}
    with tempfile.TemporaryDirectory() as folder, log.open("w") as out:
        script = Path(folder) / "engine.py"
        script.write_text(ENGINE)
        start = time.perf_counter()
        process = start_engine(
            [sys.executable, str(script), json.dumps(engine)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | logging_environment(Path(folder)),
        )
        try:
            status = process.wait()
        finally:
            end_engine(process)
        seconds = time.perf_counter() - start
    text = log.read_text(errors="replace")
    if status:
        return {"error": text.splitlines()[-15:], "status": status}
    found: dict[str, Any] = {"seconds": seconds} | logged(text, LOGGED)
    for result in re.findall(r"^RESULT (.*)$", text, re.MULTILINE):
        found |= json.loads(result)
    return found


def planned(arguments: argparse.Namespace, gpu_memory: int, release: str | None) -> dict[str, Any]:
    """The planner's figures for the same engine."""
    settings = Settings(
        gpu_memory=gpu_memory,
        ranks=Ranks(arguments.tensor_parallel_size),
        gpu_memory_utilization=arguments.gpu_memory_utilization,
        max_model_len=arguments.max_model_len,
        max_num_seqs=arguments.max_num_seqs,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        prefixes=caching_of(release, False),
    )
    recipe = None if arguments.preset == "bf16" else Recipe.parse({"preset": arguments.preset})
    found = fit(read_facts(arguments.geometry), recipe, settings)
    needs = found.needs
    return {
        "model_gib": needs.model / GIB,
        "activations_gib": needs.activations / GIB,
        "outside_torch_gib": needs.outside / GIB,
        "graphs_gib": needs.graphs / GIB,
        "budget_gib": settings.budget / GIB,
        "cache_gib": found.cache_bytes / GIB,
        "block_tokens": found.cache.block_tokens,
        "blocks": found.cache_bytes // found.cache.block_bytes,
        "needs": asdict(needs),
        "cache": asdict(found.cache),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Plan, run the engine, and write the file; the status is 1 if the engine failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--output", type=output_file, required=True, help="JSON file to write")
    add("--geometry", type=geometry_folder, default=GEOMETRY, help="folder with config.json")
    add("--preset", choices=("bf16", *get_args(Preset)), default="balanced", help="of the recipe")
    add("--gpu-memory-mib", type=positive, default=143771, help="as nvidia-smi says")
    add("--max-model-len", type=positive, default=32768)
    add("--max-num-seqs", type=positive, default=8)
    add("--max-num-batched-tokens", type=positive, default=2048)
    add("--tensor-parallel-size", type=positive, default=1)
    add("--gpu-memory-utilization", type=float, default=0.8)
    options = parser.parse_args(arguments)
    try:  # first: what cannot be planned need not be served
        plan = planned(options, options.gpu_memory_mib * MIB, installed_vllm())
    except ValueError as error:
        parser.error(f"{options.geometry} cannot be planned: {error}")
    packages = versions()
    vllm = run_engine(options, options.output.with_suffix(".log"))
    problem = {name: value for name, value in vars(options).items() if name != "output"}
    report = {
        "problem": problem | {"geometry": options.geometry.name},
        "packages": packages,
        "vllm": vllm,
        "plan": plan,
        "plan_over_vllm": {name: plan[name] / vllm[name] for name in plan if vllm.get(name)},
    }
    write_json(options.output, report)
    print(json.dumps(report, indent=1))
    return int("error" in vllm)


if __name__ == "__main__":
    end_engines_when_terminated()
    sys.exit(main())
