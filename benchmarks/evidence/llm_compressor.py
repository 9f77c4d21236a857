# SPDX-License-Identifier: Apache-2.0
"""llm-compressor's own checkpoints of the small model, scored as run.py scores ours.

It has an environment of its own (benchmarks/quality/llm_compressor.py); both tools are calibrated
with the same token ids, which the first command draws and the second hands to it:

    python benchmarks/evidence/llm_compressor.py --model build/small-nemotron-h \
        --data build/small-corpus --write-ids build/calibration.npy
    llmc/bin/python benchmarks/quality/llm_compressor.py build/small-nemotron-h build/llmc-g32 \
        --calibration-ids build/calibration.npy --group-size 32
    python benchmarks/evidence/llm_compressor.py --model build/small-nemotron-h \
        --data build/small-corpus --folders build/llmc-g32 \
        --output benchmarks/results/small-llm-compressor.json

Beside its checkpoints (`llm-compressor-g32-gptq-sym`): methods.py's on the same modules, with the
same groups and sequences (`linears-g32-gptq`). The file is written after each; what is in it
already is not measured again. Two CPU cores take some minutes for each.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # run as a script

from small_model.data import Prepared, load  # noqa: E402

from benchmarks.evidence.cases import WITHOUT_HEAD, Case  # noqa: E402
from benchmarks.evidence.model import Subject, calibration_ids, read_model  # noqa: E402
from benchmarks.evidence.report import continued, write_report  # noqa: E402
from benchmarks.evidence.run import calibration_pool, machine  # noqa: E402
from benchmarks.evidence.scoring import TokenScores, Windows, by_window, figures  # noqa: E402
from benchmarks.quality.llm_compressor import RECORD  # noqa: E402
from benchmarks.quality.weights import DenseWeights, read_weights  # noqa: E402
from vllm_nanoquant.recipe import Recipe  # noqa: E402

SECTION = "llm-compressor"


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="checkpoint that train_small_model.py made")
    add("--data", type=Path, required=True, help="folder that prepare_small_corpus.py made")
    add("--write-ids", type=Path, help="only write the calibration sequences, a .npy file")
    add("--folders", type=Path, nargs="+", default=[], help="what llm_compressor.py made")
    add("--output", type=Path, help="JSON file to write; one there is added to")
    add("--methods", nargs="*", default=["gptq", "gptq-int"], help="ours, of methods.py")
    add("--windows", type=int, default=24, help="held-out windows, at most")
    add("--window", type=int, default=2048, help="tokens of a window")
    add("--samples", type=int, default=16, help="calibration sequences")
    add("--seed", type=int, default=0, help="which training text can be drawn for calibration")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    if options.write_ids is None and options.output is None:
        parser.error("give --output, or --write-ids")
    return options


class Comparison:
    """The result file as it grows."""

    def __init__(self, options: argparse.Namespace, data: Prepared, pool: torch.Tensor) -> None:
        """Read the model and run it in BF16.

        Raises:
            ValueError: the file that is there was made in another way.
        """
        self._options = options
        self._model, kinds = read_model(options.model, torch.device(options.device))
        self._subject = Subject(self._model, kinds, pool.to(options.device))
        self._stock = read_weights(options.model)
        count = min(options.windows, len(data.heldout) // options.window)
        ids = torch.from_numpy(data.heldout[: count * options.window].astype("int64"))
        problem = {
            "parameters": sum(p.numel() for p in self._model.parameters()),
            "windows": count,
            "window": options.window,
            "calibration": {"sequences": options.samples, "tokens": options.window},
            "calibration_seed": options.seed,
            "arithmetic": "fp32, dequantized weights, plain PyTorch",
            "errors": "bootstrap over windows, paired with BF16",
        }
        self.report: dict[str, Any] = {"problem": problem, "machine": machine(options.device)}
        before = continued(options.output, **self.report)
        self.report |= {key: before.get(key, {}) for key in ("packages", "results")}
        self._windows = Windows(self._model, ids.view(count, -1).to(options.device))
        self._add("bf16", {"section": "bf16", **self._figures(self._windows.stock)})

    def theirs(self, folder: Path) -> list[int]:
        """Score what llm-compressor made in a folder; its group sizes."""
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        self.report["packages"] = record.pop("packages")
        for variant, made in record.items():
            name = f"{SECTION}-g{made['group_size']}-{variant}"
            if name in self.report["results"]:
                continue
            began = time.monotonic()
            with self._loaded(read_weights(folder / variant)) as of_weights:
                recipe = {key: made[key] for key in ("group_size", "ignore")}
                row = {"recipe": recipe, "method": variant, **of_weights, **self._scored()}
            self._finish(name, row, made["seconds"], began)
        return [made["group_size"] for made in record.values()]

    def ours(self, group_size: int, method: str) -> None:
        """Quantize the modules of its recipe, and score."""
        name = f"linears-g{group_size}-{method}"
        if name in self.report["results"]:
            return
        recipe = {"preset": "full", "group_size": group_size, "ignore": WITHOUT_HEAD}
        case = Case(SECTION, name, Recipe.parse(recipe), method)
        began = time.monotonic()
        with self._subject.quantized(case, self._options.samples) as of_weights:
            quantized = time.monotonic() - began
            row = {"recipe": recipe, "method": method, **of_weights, **self._scored()}
        self._finish(name, row, quantized, began)

    @contextmanager
    def _loaded(self, weights: DenseWeights) -> Iterator[dict[str, Any]]:
        """The model with a checkpoint's weights; yields figures as `Subject` does."""
        self._model.load_state_dict(weights.tensors)
        try:
            yield {
                "modules": len(weights.quantized),
                "weights": sum(weights.tensors[f"{n}.weight"].numel() for n in weights.quantized),
                "bits": round(weights.bits_per_weight or 16, 4),
                "relative_error": weights.relative_error(self._stock),
            }
        finally:
            self._model.load_state_dict(self._stock.tensors)

    def _scored(self) -> dict[str, Any]:
        return self._figures(self._windows.score(self._model))

    def _figures(self, scores: TokenScores) -> dict[str, Any]:
        return {**figures(scores, self._windows.stock), **by_window(scores)}

    def _finish(self, name: str, row: dict[str, Any], quantizing: float, began: float) -> None:
        times = {"seconds_quantizing": quantizing, "seconds": time.monotonic() - began}
        rounded = {key: round(seconds, 2) for key, seconds in times.items()}
        self._add(name, {"section": SECTION, **row, **rounded})

    def _add(self, name: str, row: dict[str, Any]) -> None:
        self.report["results"][name] = row
        write_report(self._options.output, self.report)
        print(
            f"{name:32} {row.get('bits', 16):.3f} bits  perplexity {row['perplexity']:.4f} "
            f"({100 * row['perplexity_change']:+.3f} %)  KL {row['kl_divergence']:.3e}",
            flush=True,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the calibration sequences, or measure."""
    options = parse_options(arguments)
    data = load(options.data)
    pool = calibration_pool(data, options.window, options.seed)
    if options.write_ids is not None:
        np.save(options.write_ids, calibration_ids(pool, options.samples, seed=0).numpy())
        return 0
    options.output.parent.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("highest")
    comparison = Comparison(options, data, pool)
    sizes: dict[int, None] = {}  # in the order of the folders
    for folder in options.folders:
        sizes |= dict.fromkeys(comparison.theirs(folder))
    for group_size in sizes:
        for method in options.methods:
            comparison.ours(group_size, method)
    return 0


if __name__ == "__main__":
    sys.exit(main())
