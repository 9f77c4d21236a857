# SPDX-License-Identifier: Apache-2.0
"""Serve one geometry in BF16, by our presets and by vLLM's own methods; write figures as JSON.

    python benchmarks/end_to_end/run.py --output results.json
    python benchmarks/end_to_end/run.py --contestants bf16 balanced fp8 --together 3 --output r.json
    python benchmarks/end_to_end/run.py --checkpoint /data/random-9b --only-load --output load.json

Each engine runs in a process of its own, so that memory is its own. Memory and load time are what
vLLM itself logs. Without --checkpoint the weights are dummies: right for speed and memory, wrong
for text. With --only-load the engines start eagerly, without graphs, and only loading is measured.
With --together engines start at once, which takes longest, and then stand still; they are measured
one after the other.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # run as a script, only this folder is on the path

from benchmarks.common import (  # noqa: E402
    GEOMETRIES,
    NO_GPU,
    geometry_folder,
    output_file,
    positive,
    require_config,
    versions,
    write_json,
)
from benchmarks.end_to_end.contestants import NAMES, PEERS, engine_options, environment  # noqa: E402
from benchmarks.end_to_end.processes import (  # noqa: E402
    MODEL_GIB,
    PEAK_GIB,
    end_engine,
    end_engines_when_terminated,
    logged,
    logging_environment,
    signal_engine,
    start_engine,
)
from vllm_nanoquant.recipe import METHOD  # noqa: E402

GEOMETRY = GEOMETRIES / "nemotron-nano-9b-v2"
# Of a prompt whose decoding is timed: PROMPT of engine.py, which cannot be read without vLLM.
PROMPT_TOKENS = 32
READY = "ready to be measured"
LOGGED = {
    "weights_gib": MODEL_GIB,
    "load_seconds": r"Model loading took [\d.]+ GiB(?: memory)? and ([\d.]+) seconds",
    "peak_gib_while_loading": PEAK_GIB,
    "graph_gib": r"Graph capturing finished in [\d.]+ secs?, took ([\d.]+) GiB",
}


def engine_arguments(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """Arguments of ``LLM`` for one contestant."""
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
    if arguments.together > 1:  # none can find out what is free while others start
        engine["gpu_memory_utilization"] = 0.05
        engine["kv_cache_memory_bytes"] = int(arguments.cache_gib * 2**30)
    return engine | engine_options(name, arguments.max_capture_size)


class Engine:
    """One engine in a process of its own."""

    def __init__(self, arguments: argparse.Namespace, name: str, folder: Path) -> None:
        """Start it; what it prints goes to a file beside the output."""
        self.log = arguments.output.with_name(f"{arguments.output.stem}-{name}.log")
        command = [
            sys.executable,
            str(HERE / "engine.py"),
            f"--engine={json.dumps(engine_arguments(arguments, name))}",
            f"--batches={json.dumps([] if arguments.only_load else arguments.batches)}",
            f"--prefill={json.dumps([] if arguments.only_load else arguments.prefill)}",
            f"--tokens={arguments.tokens}",
            f"--repeats={arguments.repeats}",
            f"--ready={READY}",
        ]
        ours = logging_environment(folder) | {
            # A function of the benchmark's own goes to vLLM's worker, to replay its graphs.
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        }
        if arguments.model_runner:
            ours["VLLM_USE_V2_MODEL_RUNNER"] = str(arguments.model_runner - 1)
        with self.log.open("w") as out:
            self._process = start_engine(
                command,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | ours | environment(name),
            )

    def wait_until_ready(self) -> None:
        """Return when it has started, or ended. It stands still then, so as not to disturb."""
        while self._process.poll() is None and f"\n{READY}\n" not in self._text():
            time.sleep(0.5)
        signal_engine(self._process, signal.SIGSTOP)

    def figures(self) -> dict[str, Any]:
        """Let it measure; its figures and what vLLM logged of it."""
        signal_engine(self._process, signal.SIGCONT)
        with suppress(BrokenPipeError):  # it has ended, and its log says why
            self._process.communicate(b"go\n")
        text = self._text()
        found = re.search(r"^RESULT (.*)$", text, re.MULTILINE)
        if self._process.returncode or not found:
            return {"error": text.splitlines()[-15:], "status": self._process.returncode}
        result = json.loads(found[1]) | logged(text, LOGGED)
        result["plugin"] = re.findall(rf"{METHOD}: (quantized .*)$", text, re.MULTILINE)
        result["kernels"] = sorted(set(re.findall(r"Using (\w+Kernel) for", text)))
        # The file that vLLM's update of Mamba states was tuned with, if any.
        result["state_update"] = re.findall(r"Using SSM config from (?:\S*/)?(\S+) for", text)[:1]
        result["model_runner"] = 2 if "Using V2 Model Runner" in text else 1
        late = re.findall(r"kernel JIT compilation during inference: (\w+)", text)
        result["kernels_compiled_while_serving"] = sorted(set(late))
        return result

    def end(self) -> None:
        """End what is left of it."""
        end_engine(self._process)

    def _text(self) -> str:
        return self.log.read_text(errors="replace")


def measure(arguments: argparse.Namespace, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Start engines at once, then measure one after the other; their figures in order."""
    with tempfile.TemporaryDirectory() as folder:
        engines: list[Engine] = []
        try:
            for name in names:
                engines.append(Engine(arguments, name, Path(folder)))
            for engine in engines:
                engine.wait_until_ready()
            for engine in engines:
                yield engine.figures()
        finally:
            for engine in engines:
                engine.end()


def table(results: dict[str, Any], batches: list[int], prefill: list[int]) -> str:
    """The figures as a Markdown table, one row a contestant."""
    columns = ["weights", "GiB", "peak GiB", "load s"]
    columns += [f"tok/s at {size}" for size in batches]
    columns += [f"ttft {length} ms" for length in prefill]
    rows = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name, result in results.items():
        if "error" in result:
            rows.append(f"| {name} | failed |")
            continue
        rates = [
            f"{rate['median']:.0f}" for rate in result["decode_tokens_per_second"].values()
        ] or ["-"] * len(batches)
        first = [f"{t['median']:.1f}" for t in result["time_to_first_token_ms"].values()]
        first = first or ["-"] * len(prefill)
        memory = [
            str(result.get(figure, "-"))
            for figure in ("weights_gib", "peak_gib_while_loading", "load_seconds")
        ]
        rows.append("| " + " | ".join([name, *memory, *rates, *first]) + " |")
    return "\n".join(rows)


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; on a mistake, say what is wrong and exit with status 2.

    All that can be known to fail is refused here: an engine takes minutes to find out.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--output", type=output_file, required=True, help="JSON file to write")
    add("--geometry", type=geometry_folder, default=GEOMETRY, help="folder with config.json")
    add("--checkpoint", type=Path, help="folder with weights; dummies without it")
    add("--contestants", nargs="+", choices=NAMES, default=["bf16", "ssm", "balanced"])
    add("--batches", nargs="+", type=positive, default=[1, 2, 4, 8])
    add("--tokens", type=positive, default=128, help="to generate of each sequence")
    add("--prefill", nargs="+", type=positive, default=[2048])
    add(
        "--model-runner",
        type=int,
        choices=(1, 2),
        help="vLLM's; its own choice without it: for hybrids the first up to 0.28, then the second",
    )
    add("--max-capture-size", type=positive, help="cap on CUDA graphs; default 8")
    add("--repeats", type=positive, default=3)
    add("--max-model-len", type=positive, default=4096)
    add("--together", type=positive, default=1, help="engines that start at once")
    add("--cache-gib", type=float, default=6.0, help="KV cache of each of those")
    add("--only-load", action="store_true")
    options = parser.parse_args(arguments)
    if options.checkpoint:
        require_config(parser, "--checkpoint", options.checkpoint)
    if options.tokens < 2:
        parser.error(f"--tokens {options.tokens}: the first is not timed, so give 2 or more")
    if not options.cache_gib > 0:
        parser.error(f"--cache-gib {options.cache_gib}: give more than 0")
    wanted = {"--tokens": PROMPT_TOKENS + options.tokens, "--prefill": max(options.prefill) + 1}
    for name, length in wanted.items():
        if not options.only_load and length > options.max_model_len:
            parser.error(f"{name}: {length} tokens; give --max-model-len {length} or more")
    ours = [name for name in options.contestants if name not in PEERS]
    if ours and not entry_points(group="vllm.general_plugins", name="nanoquant"):
        parser.error(
            "vLLM will not find the plugin; run this first, in this environment: pip install ."
        )
    return options


def describe_problem(options: argparse.Namespace) -> dict[str, Any]:
    """What is measured, and how."""
    return {
        "geometry": options.geometry.name,
        "weights": "random checkpoint" if options.checkpoint else "dummy",
        "prompt_tokens": PROMPT_TOKENS,
        "decode_tokens": options.tokens,
        "max_capture_size": options.max_capture_size,
        "started_at_once": options.together,
        "only_load": options.only_load,
        "batches": [] if options.only_load else options.batches,
        "prefill": [] if options.only_load else options.prefill,
        "repeats": options.repeats,
        "max_model_len": options.max_model_len,
        "max_num_seqs": max(options.batches),
        # Engines that start alone measure what is free.
        "cache_gib": options.cache_gib if options.together > 1 else None,
        "model_runner": options.model_runner,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write the file after each contestant; the status is 1 if one failed."""
    options = parse_options(arguments)
    if not torch.cuda.is_available():
        print(f"{NO_GPU}; the figures will say nothing about one", file=sys.stderr)
    report: dict[str, Any] = {
        "problem": describe_problem(options),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "packages": versions(),
        "results": {},
    }
    for first in range(0, len(options.contestants), options.together):
        names = options.contestants[first : first + options.together]
        for name, figures in zip(names, measure(options, names), strict=True):
            report["results"][name] = figures
            write_json(options.output, report)
            print(name, json.dumps(figures), flush=True)
    print(table(report["results"], options.batches, options.prefill))
    return int(any("error" in figures for figures in report["results"].values()))


if __name__ == "__main__":
    end_engines_when_terminated()
    sys.exit(main())
