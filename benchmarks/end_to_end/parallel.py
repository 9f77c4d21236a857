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
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # run as a script, only this folder is on the path

from benchmarks.common import (  # noqa: E402
    output_file,
    positive,
    require_config,
    versions,
    write_json,
)
from benchmarks.end_to_end.processes import (  # noqa: E402
    end_engine,
    end_engines_when_terminated,
    start_engine,
)
from vllm_nanoquant.kernels.accuracy import mean_relative_error  # noqa: E402
from vllm_nanoquant.recipe import METHOD, Preset  # noqa: E402

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
        self.process = start_engine(command)

    def result(self) -> dict[str, Any]:
        """Wait for its figures, and under "logits" its logits [prompts, vocabulary], fp32.

        Raises:
            RuntimeError: it ended without any.
        """
        if self.process.wait() or not self.figures.is_file():
            raise RuntimeError(f"the engine on {self.ranks} GPUs ended without a result")
        return json.loads(self.figures.read_text()) | load_file(self.logits)

    def end(self) -> None:
        """End what is left of it."""
        end_engine(self.process)


def compare(logits: torch.Tensor, expected: torch.Tensor) -> dict[str, Any]:
    """How far logits [prompts, vocabulary] are from expected ones."""
    return {
        "mean_relative_error": mean_relative_error(logits, expected),
        "greatest_difference": float((logits - expected).abs().max()),
        "standard_deviation_of_logits": float(expected.std()),
        "same_first_choice": int((logits.argmax(1) == expected.argmax(1)).sum()),
        "prompts": len(logits),
    }


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; on a mistake, say what is wrong and exit with status 2."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--ranks", type=positive, required=True, help="tensor-parallel ranks")
    parser.add_argument("--preset", choices=get_args(Preset), default="balanced")
    parser.add_argument("--batches", nargs="+", type=positive, default=[1, 2, 4, 8])
    parser.add_argument("--output", type=output_file, required=True, help="JSON file to write")
    options = parser.parse_args(arguments)
    require_config(parser, "--checkpoint", options.checkpoint)
    if options.ranks < 2:
        parser.error(f"--ranks {options.ranks}: one GPU is what they are compared with; give 2")
    found = torch.cuda.device_count()
    if found < options.ranks:
        parser.error(f"--ranks {options.ranks}: there are {found} GPUs; give that many or fewer")
    return options


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Results of the engines on one GPU and on several, which run at once.

    Raises:
        RuntimeError: one of them ended without any.
    """
    with tempfile.TemporaryDirectory() as folder:
        engines: list[Engine] = []
        try:
            for ranks in (1, options.ranks):
                engines.append(Engine(options, ranks, Path(folder)))
            return [engine.result() for engine in engines]
        finally:
            for engine in engines:
                engine.end()


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare and write the file; the status is 1 if an engine failed."""
    options = parse_options(arguments)
    packages = versions()
    try:
        one, several = run(options)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    expected, logits = one.pop("logits"), several.pop("logits")
    report = {
        "problem": {
            "checkpoint": options.checkpoint.name,
            "preset": options.preset,
            "tensor_parallel_size": options.ranks,
        },
        "device": f"{options.ranks} {torch.cuda.get_device_name()}",
        "packages": packages,
        "results": {"one_gpu": one, "several": several, "logits": compare(logits, expected)},
    }
    print(json.dumps(report["results"]))  # first: a NaN among them cannot be written
    write_json(options.output, report)
    return 0


if __name__ == "__main__":
    end_engines_when_terminated()
    sys.exit(main())
