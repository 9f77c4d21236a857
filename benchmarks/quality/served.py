# SPDX-License-Identifier: Apache-2.0
"""llm-compressor's W4A16 checkpoints, served by stock vLLM and by us: are the logits the same?

    llmc/bin/python benchmarks/quality/llm_compressor.py models/tiny-nemotron-h llmc-served \
        --variants rtn-sym rtn-asym --ignore lm_head 're:.*in_proj'
    python benchmarks/quality/served.py llmc-served/rtn-sym llmc-served/rtn-asym \
        --output benchmarks/results/tiny-served-llm-compressor.json

Both serve the same folder: stock vLLM with VLLM_PLUGINS='', ours with quantization=
"nanoquant_w4a16". The log probabilities of the whole vocabulary at each place of held-out text are
compared (logits up to a number that is the same for all tokens of a place). The two kernels round
at different places, so they cannot agree to the bit. What is allowed is measured: the same weights,
dequantized, run in fp32 by transformers are the exact answer, and the BF16 model served by stock
vLLM shows how far bf16 arithmetic is from it where nothing is quantized.

in_proj is left out because the kernel of stock vLLM for CPUs wants outputs in multiples of 32, and
the shipped model's in_proj has 1288. vLLM compiles nothing: enforce_eager.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run as a script, only this folder is on the path

from benchmarks.common import VLLM, output_file, versions, write_json  # noqa: E402
from benchmarks.quality.evaluate import dense_model  # noqa: E402
from benchmarks.quality.metrics import difference  # noqa: E402
from benchmarks.quality.run import MODEL, machine  # noqa: E402
from benchmarks.quality.weights import read_weights  # noqa: E402
from tests.serving.engines import METHOD, heldout_windows, job  # noqa: E402

WORKER = Path(__file__).with_name("prompt_logprobs.py")
PACKAGES = ("torch", *VLLM, "transformers", "compressed-tensors", "vllm-nanoquant")
NO_PLUGINS = {"VLLM_PLUGINS": ""}


class ServingError(Exception):
    """An engine that did not serve; the text is the error that it ended with."""


def serve(folder: Path, windows: list[list[int]], ours: bool) -> torch.Tensor:
    """Log probabilities [windows, T - 1, vocabulary], fp32, of a checkpoint served by vLLM.

    Raises:
        ServingError: vLLM refused it.
    """
    engine = dict(job("", folder, engine={"max_model_len": len(windows[0]) + 8})["engine"])
    if ours:
        engine["quantization"] = METHOD
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path} | ({} if ours else NO_PLUGINS)
    with tempfile.TemporaryDirectory() as name:
        asked, answer = Path(name) / "job.json", Path(name) / "answer.safetensors"
        asked.write_text(json.dumps({"engine": engine, "windows": windows}), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, str(WORKER), str(asked), str(answer)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ServingError(last_error(done.stdout))
        return load_file(answer)["logprobs"]


def last_error(log: str) -> str:
    """The last line of a log that names an error; its last line where none does."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if "Error:" in line]
    return (errors or lines or ["no output"])[-1]


@torch.inference_mode()
def exact(folder: Path, windows: list[list[int]]) -> torch.Tensor:
    """The same of the dequantized weights, in fp32 by transformers."""
    model = dense_model(MODEL, read_weights(folder))
    rows = [model(torch.tensor([window])).logits[0, :-1] for window in windows]
    return torch.stack(rows).log_softmax(dim=-1)


def compare(folder: Path, windows: list[list[int]]) -> dict[str, Any]:
    """What stock vLLM and ours make of one checkpoint."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    result: dict[str, Any] = {"quantization_config": config.get("quantization_config")}
    answers = {"exact": exact(folder, windows)}
    for name, ours in (("stock", False), ("ours", True)):
        try:
            answers[name] = serve(folder, windows, ours)
        except ServingError as error:
            result[f"{name}_refused"] = str(error)
    for a, b in (("ours", "stock"), ("stock", "exact"), ("ours", "exact")):
        if a in answers and b in answers:
            result[f"{a}_{b}"] = difference(answers[a], answers[b])
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", type=Path, nargs="+", help="llm-compressor's folders")
    parser.add_argument("--output", type=output_file, required=True, help="JSON file to write")
    parser.add_argument("--windows", type=int, default=4, help="windows of held-out text")
    parser.add_argument("--tokens", type=int, default=256, help="tokens in a window")
    arguments = parser.parse_args()
    # Before the engines run: what fails here must not cost their results.
    packages = versions(PACKAGES)
    windows = heldout_windows(MODEL, arguments.tokens, arguments.windows)
    bf16 = difference(serve(MODEL, windows, ours=False), exact(MODEL, windows))
    report: dict[str, Any] = {
        "problem": {
            "model": MODEL.name,
            "text": "heldout.txt",
            "windows": arguments.windows,
            "tokens": arguments.tokens,
            "compared": "log probabilities of the whole vocabulary at each place",
        },
        "device": machine(),
        "packages": packages,
        "bf16_model_stock_exact": bf16,
        "results": {},
    }
    for folder in arguments.checkpoints:
        report["results"][folder.name] = compare(folder, windows)
        write_json(arguments.output, report)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
