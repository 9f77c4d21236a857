# SPDX-License-Identifier: Apache-2.0
"""What int4 costs the shipped model: every preset, algorithm and group size, and llm-compressor's.

    python benchmarks/quality/run.py --work /tmp/quality --llm-compressor llmc-out \
        --output benchmarks/results/tiny-quality.json

Checkpoints are made with `nanoquant quantize` in the work folder; those that are there already are
taken as they are, GPTQ's if they were calibrated alike. It is calibrated with the text that the
model was trained on (six novels out of a Debian package, tools/tiny_model/text.py, or
--calibration-text), never with the held-out text that is scored. --llm-compressor is the folder
that benchmarks/quality/llm_compressor.py made, with the same text. Its modules are compared with
ours at the same group size: preset full without the LM head is what its recipe covers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # run as a script

from benchmarks.common import output_file, versions, write_json  # noqa: E402
from benchmarks.quality.evaluate import Evaluation, Evaluator, in_words, write_config  # noqa: E402
from benchmarks.quality.metrics import paired_difference  # noqa: E402
from vllm_nanoquant.cli.main import main as nanoquant  # noqa: E402
from vllm_nanoquant.files import write_whole  # noqa: E402

MODEL = ROOT / "models" / "tiny-nemotron-h"
PRESETS = ("ssm", "balanced", "quality", "full")
ALGORITHMS = ("minmax", "mse", "gptq")
GROUPS = (128, 32)
PEERS = ("rtn-sym", "rtn-asym", "mse-sym", "mse-asym", "gptq-sym", "gptq-asym")
PEER_RECORD = "llm_compressor.json"
PEER_GROUP = 32
PEER_COUNTERPARTS = {"minmax": "rtn", "mse": "mse", "gptq": "gptq"}
PACKAGES = ("torch", "transformers", "safetensors", "compressed-tensors", "vllm-nanoquant")


@dataclass(frozen=True)
class Case:
    """One checkpoint of ours."""

    preset: str
    group_size: int
    algorithm: str
    ignore: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """In the result file, and of its folder or the beginning of that."""
        without = "".join(f"-no-{name}" for name in self.ignore)
        return f"{self.preset}{without}-g{self.group_size}-{self.algorithm}"


def cases() -> Iterator[Case]:
    """Every checkpoint of ours, the quick ones first."""
    for algorithm in ALGORITHMS:
        yield Case("full", PEER_GROUP, algorithm, ("lm_head",))
        for preset in PRESETS:
            for group_size in GROUPS:
                yield Case(preset, group_size, algorithm)


def folder_name(case: Case, options: argparse.Namespace) -> str:
    """Of a case's checkpoint: with another calibration it is another checkpoint."""
    if case.algorithm != "gptq":
        return case.name
    text = hashlib.sha256(options.calibration_text.read_bytes()).hexdigest()[:12]
    return f"{case.name}-{options.samples}x{options.length}-{text}"


def make(case: Case, model: Path, folder: Path, options: argparse.Namespace) -> None:
    """Make a checkpoint with the command that a user would type; nothing if it is there already.

    Raises:
        RuntimeError: the command failed; it has said why.
    """
    if (folder / "config.json").exists():
        return
    command = ["quantize", str(model), str(folder), "--preset", case.preset]
    command += ["--group-size", str(case.group_size), "--algorithm", case.algorithm]
    for pattern in case.ignore:
        command += ["--ignore", pattern]
    if case.algorithm == "gptq":
        command += ["--calibration-text", str(options.calibration_text)]
        command += ["--calibration-samples", str(options.samples)]
        command += ["--calibration-length", str(options.length)]
    if nanoquant(command):
        raise RuntimeError(f"nanoquant {' '.join(command)} failed")


def quick_model(work: Path) -> Path:
    """The shipped model in a folder of its own, with a scan that is quicker to calibrate with."""
    folder = work / "model"
    if not folder.exists():
        shutil.copytree(MODEL, folder)
        write_config(MODEL, folder)
    return folder


def write_training_text(path: Path) -> None:
    """Fetch the novels and write the chapters that the model was trained on."""
    from tiny_model.text import load_corpus

    write_whole(path, "\n\n".join(load_corpus([]).train))


def comparisons(found: dict[str, Evaluation]) -> list[dict[str, Any]]:
    """Ours against each of llm-compressor's of the same algorithm, paired window by window."""
    result = []
    for algorithm, counterpart in PEER_COUNTERPARTS.items():
        ours = Case("full", PEER_GROUP, algorithm, ("lm_head",)).name
        for symmetry in ("sym", "asym"):
            theirs = f"llm-compressor {counterpart}-{symmetry}"
            if ours not in found or theirs not in found:
                continue
            one, other = found[ours].scores, found[theirs].scores
            kl = paired_difference(one.divergence_by_window, other.divergence_by_window)
            loss = paired_difference(one.loss_by_window, other.loss_by_window)
            result.append(
                {
                    "ours": ours,
                    "theirs": theirs,
                    "kl_difference": kl[0],
                    "kl_difference_error": kl[1],
                    "loss_difference": loss[0],
                    "loss_difference_error": loss[1],
                }
            )
    return result


def machine() -> dict[str, Any]:
    """What this runs on."""
    return {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}


def parse_options() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints")
    parser.add_argument("--output", type=output_file, required=True, help="JSON file to write")
    parser.add_argument("--llm-compressor", type=Path, help="folder that llm_compressor.py made")
    parser.add_argument("--calibration-text", type=Path, help="plain text instead of the novels")
    parser.add_argument("--samples", type=int, default=32, help="calibration sequences")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--window", type=int, default=512, help="tokens of a window of the score")
    return parser.parse_args()


def problem(options: argparse.Namespace) -> dict[str, Any]:
    """What is measured, and how."""
    return {
        "model": MODEL.name,
        "text": "heldout.txt",
        "window": options.window,
        "arithmetic": "fp32, dequantized weights, transformers",
        "calibration": {
            "text": options.calibration_text.name,
            "tokens": options.samples * options.length,
            "samples": options.samples,
            "length": options.length,
        },
    }


def main() -> None:
    """Make the checkpoints, evaluate all, and write the result after each."""
    options = parse_options()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.calibration_text is None:
        options.calibration_text = options.work / "training.txt"
        if not options.calibration_text.exists():
            write_training_text(options.calibration_text)
    model = quick_model(options.work)
    report: dict[str, Any] = {
        "problem": problem(options),
        "device": machine(),
        "packages": versions(PACKAGES),
        "complete": False,
    }
    evaluator = Evaluator(MODEL, options.window)
    found = {"bf16": evaluator.stock}

    def add(name: str, folder: Path) -> None:
        found[name] = evaluator.evaluate(folder)
        tqdm.write(in_words(name, found[name].figures))
        report["results"] = {key: evaluation.figures for key, evaluation in found.items()}
        write_json(options.output, report)

    for case in tqdm(list(cases()), unit="checkpoint", disable=None):
        folder = options.work / folder_name(case, options)
        make(case, model, folder, options)
        add(case.name, folder)
    if options.llm_compressor:
        record = options.llm_compressor / PEER_RECORD
        report["llm_compressor"] = json.loads(record.read_text(encoding="utf-8"))
        for name in PEERS:
            if name in report["llm_compressor"]:
                add(f"llm-compressor {name}", options.llm_compressor / name)
        report["comparisons"] = comparisons(found)
    report["complete"] = True
    write_json(options.output, report)


if __name__ == "__main__":
    main()
