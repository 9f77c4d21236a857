# SPDX-License-Identifier: Apache-2.0
"""Measure every way to quantize on the model of tools/train_small_model.py.

    python benchmarks/evidence/run.py --model build/small-nemotron-h --data build/small-corpus \
        --output benchmarks/results/evidence.json --minutes 8

The model runs in plain PyTorch in fp32, with its weights rounded in place by the package's own
quantizers and recipes: what is compared is weights, not kernels. Beside it: BF16 (the checkpoint as
it is). Text: pages and whole documents that training never saw; GPTQ is calibrated with training
text. Cases come in the order of benchmarks/evidence/cases.py; the file is written after each, so
that whatever ends the run, the results until then are there.
"""

from __future__ import annotations

import argparse
import platform
import re
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # run as a script

from small_model.data import Prepared, load  # noqa: E402

from benchmarks.evidence.cases import Case, cases  # noqa: E402
from benchmarks.evidence.model import Subject, read_model  # noqa: E402
from benchmarks.evidence.report import continued, write_report  # noqa: E402
from benchmarks.evidence.scoring import Windows, by_position, by_window, figures  # noqa: E402

_CALIBRATION_POOL = 1024


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="checkpoint that train_small_model.py made")
    add("--data", type=Path, required=True, help="folder that prepare_small_corpus.py made")
    add("--output", type=Path, required=True, help="JSON file to write; one there is added to")
    add("--minutes", type=float, default=60.0, help="no case is begun after that")
    add("--match", help="regular expression: only cases with such a name")
    add("--windows", type=int, default=96, help="held-out windows, at most")
    add("--window", type=int, default=2048, help="tokens of a window")
    add("--long-window", type=int, default=16384, help="tokens of a long document")
    add("--samples", type=int, default=64, help="calibration sequences")
    add("--seed", type=int, default=0, help="which training text can be drawn for calibration")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def machine(device: str) -> dict[str, Any]:
    """What this runs on."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine()
    return {"device": name, "python": platform.python_version(), "torch": version("torch")}


def calibration_pool(data: Prepared, window: int, seed: int) -> torch.Tensor:
    """Windows of training text to draw calibration sequences from, int64 [sequences, window]."""
    ids = torch.from_numpy(data.train.astype("int64"))
    random = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(ids) - window, (_CALIBRATION_POOL, 1), generator=random)
    return ids[starts + torch.arange(window)]


class Measurement:
    """The result file as it grows."""

    def __init__(self, options: argparse.Namespace, data: Prepared) -> None:
        """Read the model and run it in BF16.

        Raises:
            ValueError: the file that is there was made in another way.
        """
        self._options = options
        device = torch.device(options.device)
        model, kinds = read_model(options.model, device)
        self.kinds = kinds
        pool = calibration_pool(data, options.window, options.seed)
        self._subject = Subject(model, kinds, pool.to(device))
        ids = torch.from_numpy(data.heldout.astype("int64"))
        count = min(options.windows, len(ids) // options.window)
        short = ids[: count * options.window].view(count, options.window)
        long = torch.from_numpy(data.long.astype("int64"))[:, : options.long_window]
        self.report: dict[str, Any] = {
            "problem": {
                "parameters": sum(p.numel() for p in model.parameters()),
                "windows": count,
                "window": options.window,
                "long_windows": len(long),
                "long_window": options.long_window,
                "calibration": {"sequences": options.samples, "tokens": options.window},
                "calibration_seed": options.seed,
                "arithmetic": "fp32, dequantized weights, plain PyTorch",
                "errors": "bootstrap over windows, paired with BF16",
                "simulated": ["fp8", "rtn-*", "mse-sym", "gptq-sym", "gptq-mse-sym", "gptq-asym"],
            },
            "machine": machine(options.device),
        }
        before = continued(options.output, **self.report)
        self.report["results"] = before.get("results", {})
        self._short = Windows(model, short.to(device))
        self._long = Windows(model, long.contiguous().to(device))
        self.report["results"]["bf16"] = {
            "section": "bf16",
            **figures(self._short.stock, self._short.stock),
            **by_window(self._short.stock),
            "long": self._long_figures(self._long.stock),
        }
        self.write()

    def measure(self, case: Case) -> None:
        """Quantize as the case says, score, and write the file."""
        began = time.monotonic()
        with self._subject.quantized(case, self._options.samples) as of_weights:
            quantized = time.monotonic() - began
            scores = self._short.score(self._subject.model)
            result = {
                "section": case.section,
                "recipe": case.recipe.model_dump(include={"preset", "group_size", "ignore"}),
                "method": case.method,
                **of_weights,
                **figures(scores, self._short.stock),
                **by_window(scores),
            }
            if case.is_long:
                result["long"] = self._long_figures(self._long.score(self._subject.model))
        result["seconds_quantizing"] = round(quantized, 2)
        result["seconds"] = round(time.monotonic() - began, 2)
        self.report["results"][case.name] = result
        self.write()
        print(
            f"{case.name:40} {result['bits']:.3f} bits  perplexity {result['perplexity']:.4f} "
            f"({100 * result['perplexity_change']:+.3f} ± "
            f"{100 * result['perplexity_change_error']:.3f} %)  "
            f"KL {result['kl_divergence']:.3e}  agreement {result['agreement']:.4f}  "
            f"{result['seconds']:.1f} s",
            flush=True,
        )

    def _long_figures(self, scores: Any) -> dict[str, Any]:
        return {
            **figures(scores, self._long.stock),
            "positions": by_position(scores, self._long.stock),
        }

    def write(self) -> None:
        """Write the file, whole."""
        write_report(self._options.output, self.report)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the time allows; 1 if a case failed."""
    began = time.monotonic()
    options = parse_options(arguments)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("highest")
    measurement = Measurement(options, load(options.data))
    stock = measurement.report["results"]["bf16"]
    seconds = time.monotonic() - began
    print(f"bf16: perplexity {stock['perplexity']:.4f}, {seconds:.0f} s", flush=True)
    failed = {}
    for case in cases(measurement.kinds):
        if options.match and not re.search(options.match, case.name):
            continue
        if time.monotonic() - began > 60 * options.minutes:
            print(f"time is up before {case.name}")
            break
        try:
            measurement.measure(case)
        except (RuntimeError, ValueError) as error:  # one case must not cost the others
            failed[case.name] = str(error)[:500]
            print(f"{case.name} failed: {error}"[:1000], flush=True)
    measurement.report["failed"] = failed
    measurement.report["seconds"] = round(time.monotonic() - began, 1)
    measurement.write()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
