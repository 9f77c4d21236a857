# SPDX-License-Identifier: Apache-2.0
"""Serve one geometry as BF16 and by each preset, in one run, and write the figures as JSON.

    python benchmarks/end_to_end/run.py --output results.json
    python benchmarks/end_to_end/run.py --checkpoint /data/random-9b --only-load --output load.json

Each engine runs in a process of its own, so that memory is its own. Memory and load time are what
vLLM itself logs. Without --checkpoint the weights are dummies: right for speed and memory, wrong
for text. With --only-load the engines start eagerly, without graphs, and only loading is measured.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from vllm_nanoquant.recipe import METHOD

HERE = Path(__file__).parent
GEOMETRY = HERE.parent / "geometry" / "nemotron-nano-9b-v2"
# What vLLM says about memory; the peak is said at DEBUG level only.
LOGGED = {
    "weights_gib": r"Model loading took ([\d.]+) GiB memory",
    "load_seconds": r"Model loading took [\d.]+ GiB memory and ([\d.]+) seconds",
    "peak_gib_while_loading": r"Peak GPU memory after loading weights: ([\d.]+) GiB",
    "graph_gib": r"Graph capturing finished in [\d.]+ secs?, took ([\d.]+) GiB",
}
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"out": {"class": "logging.StreamHandler", "stream": "ext://sys.stdout"}},
    "loggers": {
        "vllm": {"handlers": ["out"], "level": "INFO", "propagate": False},
        "vllm.model_executor.model_loader.base_loader": {"level": "DEBUG"},
    },
}


def engine_arguments(arguments: argparse.Namespace, preset: str) -> dict[str, Any]:
    """Arguments of ``LLM`` for one preset; ``bf16`` is the model as it is."""
    engine: dict[str, Any] = {
        "model": str(arguments.checkpoint or arguments.geometry),
        "load_format": "auto" if arguments.checkpoint else "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": arguments.max_model_len,
        "max_num_seqs": max(arguments.batches),
        "enable_prefix_caching": False,
        "enforce_eager": arguments.only_load,
        "gpu_memory_utilization": 0.8,
    }
    if preset != "bf16":
        engine["quantization"] = METHOD
        options: dict[str, Any] = {"preset": preset}
        if arguments.max_capture_size:
            options["max_capture_size"] = arguments.max_capture_size
        engine["hf_overrides"] = {"quantization_config": options}
    return engine


def measure(arguments: argparse.Namespace, preset: str, log: Path) -> dict[str, Any]:
    """Run one engine and gather its figures and what vLLM logged of it."""
    command = [
        sys.executable,
        str(HERE / "engine.py"),
        f"--engine={json.dumps(engine_arguments(arguments, preset))}",
        f"--batches={json.dumps([] if arguments.only_load else arguments.batches)}",
        f"--prefill={json.dumps([] if arguments.only_load else arguments.prefill)}",
        f"--repeats={arguments.repeats}",
    ]
    with tempfile.TemporaryDirectory() as folder, log.open("w") as out:
        settings = Path(folder) / "logging.json"
        settings.write_text(json.dumps(LOGGING))
        environment = os.environ | {"VLLM_LOGGING_CONFIG_PATH": str(settings)}
        done = subprocess.run(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment, check=False
        )
    text = log.read_text(errors="replace")
    found = re.search(r"^RESULT (.*)$", text, re.MULTILINE)
    if done.returncode or not found:
        return {"error": text.splitlines()[-15:], "status": done.returncode}
    result = json.loads(found[1])
    for name, pattern in LOGGED.items():
        if hit := re.search(pattern, text):
            result[name] = float(hit[1])
    result["plugin"] = re.findall(rf"{METHOD}: (quantized .*)$", text, re.MULTILINE)
    late = re.findall(r"kernel JIT compilation during inference: (\w+)", text)
    result["kernels_compiled_while_serving"] = sorted(set(late))
    return result


def packages() -> dict[str, str]:
    """Versions of what decides the figures."""
    found = {"python": platform.python_version()}
    for name in ("vllm", "torch", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def table(results: dict[str, Any], batches: list[int], prefill: list[int]) -> str:
    """The figures as a Markdown table, one row a preset."""
    columns = ["weights", "GiB", "peak GiB", "load s"]
    columns += [f"tok/s at {size}" for size in batches]
    columns += [f"ttft {length} ms" for length in prefill]
    rows = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for preset, result in results.items():
        if "error" in result:
            rows.append(f"| {preset} | failed |")
            continue
        rates = [
            f"{rate['median']:.0f}" for rate in result["decode_tokens_per_second"].values()
        ] or ["-"] * len(batches)
        first = [f"{t['median']:.1f}" for t in result["time_to_first_token_ms"].values()]
        first = first or ["-"] * len(prefill)
        memory = [
            str(result.get(name, "-"))
            for name in ("weights_gib", "peak_gib_while_loading", "load_seconds")
        ]
        rows.append("| " + " | ".join([preset, *memory, *rates, *first]) + " |")
    return "\n".join(rows)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--geometry", type=Path, default=GEOMETRY, help="folder with config.json")
    parser.add_argument("--checkpoint", type=Path, help="folder with weights; dummies without it")
    parser.add_argument("--presets", nargs="+", default=["bf16", "ssm", "balanced"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--prefill", nargs="+", type=int, default=[2048])
    parser.add_argument("--max-capture-size", type=int, help="cap on CUDA graphs; default 8")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--only-load", action="store_true")
    arguments = parser.parse_args()
    report: dict[str, Any] = {
        "problem": {
            "geometry": arguments.geometry.name,
            "weights": "random checkpoint" if arguments.checkpoint else "dummy",
            "prompt_tokens": 32,
            "decode_tokens": 128,
            "max_capture_size": arguments.max_capture_size,
        },
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "packages": packages(),
        "results": {},
    }
    for preset in arguments.presets:
        log = arguments.output.with_name(f"{arguments.output.stem}-{preset}.log")
        report["results"][preset] = measure(arguments, preset, log)
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
        print(preset, json.dumps(report["results"][preset]), flush=True)
    print(table(report["results"], arguments.batches, arguments.prefill))


if __name__ == "__main__":
    main()
