# SPDX-License-Identifier: Apache-2.0
"""Serve one checkpoint on one GPU and on several; compare logits, and time the several.

    python benchmarks/random_checkpoint.py benchmarks/geometry/nemotron-nano-9b-v2 /data/random-9b
    python benchmarks/end_to_end/parallel.py --ranks 2 --checkpoint /data/random-9b --output r.json

The logits are those of the first token after each of a few prompts, all of the vocabulary, less
their mean (vLLM gives log probabilities). One GPU runs eagerly, since only its logits are wanted;
several run compiled and with CUDA graphs, as in serving. Each engine has a process of its own. Both
start at once, since starting takes longest, and are told how much memory the KV cache takes: one
cannot measure that while the other gives memory back.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # run as a script, only this folder is on the path

from benchmarks.common import versions  # noqa: E402
from vllm_nanoquant.recipe import METHOD  # noqa: E402

KV_CACHE_BYTES = 4 << 30


def engine_arguments(arguments: argparse.Namespace, ranks: int) -> dict[str, Any]:
    """Arguments of ``LLM`` for a number of tensor-parallel ranks."""
    return {
        "model": str(arguments.checkpoint),
        "skip_tokenizer_init": True,
        "max_model_len": 4096,
        "max_num_seqs": 8,
        "max_logprobs": -1,
        "enable_prefix_caching": False,
        "enforce_eager": ranks == 1,
        "gpu_memory_utilization": 0.3,
        "kv_cache_memory_bytes": KV_CACHE_BYTES,
        "tensor_parallel_size": ranks,
        "quantization": METHOD,
        "hf_overrides": {"quantization_config": {"preset": arguments.preset}},
    }


class Engine:
    """One engine in a process of its own; its log goes where ours goes."""

    def __init__(self, arguments: argparse.Namespace, ranks: int, folder: Path) -> None:
        """Start it."""
        self.ranks = ranks
        self.logits, self.figures = folder / f"{ranks}.safetensors", folder / f"{ranks}.result"
        job = {
            "engine": engine_arguments(arguments, ranks),
            "batches": [] if ranks == 1 else arguments.batches,
            "logits": str(self.logits),
            "figures": str(self.figures),
        }
        command = [sys.executable, str(HERE / "parallel_engine.py"), json.dumps(job)]
        self.process = subprocess.Popen(command)

    def result(self) -> dict[str, Any]:
        """Wait for its figures, and under "logits" its logits [prompts, vocabulary], fp32.

        Raises:
            RuntimeError: it ended without any.
        """
        if self.process.wait() or not self.figures.is_file():
            raise RuntimeError(f"the engine on {self.ranks} GPUs ended without a result")
        return json.loads(self.figures.read_text()) | load_file(self.logits)


def compare(logits: torch.Tensor, expected: torch.Tensor) -> dict[str, Any]:
    """How far logits [prompts, vocabulary] are from expected ones."""
    return {
        "mean_relative_error": float((logits - expected).abs().mean() / expected.abs().mean()),
        "greatest_difference": float((logits - expected).abs().max()),
        "standard_deviation_of_logits": float(expected.std()),
        "same_first_choice": int((logits.argmax(1) == expected.argmax(1)).sum()),
        "prompts": len(logits),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--ranks", type=int, required=True, help="tensor-parallel ranks")
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        engines = [Engine(arguments, ranks, Path(folder)) for ranks in (1, arguments.ranks)]
        one, several = (engine.result() for engine in engines)
    expected, logits = one.pop("logits"), several.pop("logits")
    report = {
        "problem": {
            "checkpoint": arguments.checkpoint.name,
            "preset": arguments.preset,
            "tensor_parallel_size": arguments.ranks,
        },
        "device": f"{arguments.ranks} {torch.cuda.get_device_name()}",
        "packages": versions(),
        "results": {"one_gpu": one, "several": several, "logits": compare(logits, expected)},
    }
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["results"]))


if __name__ == "__main__":
    main()
