# SPDX-License-Identifier: Apache-2.0
"""W4A16 checkpoints of a model by llm-compressor, to compare ours with.

It wants versions of its own of transformers and compressed-tensors, so it gets an environment of
its own; vllm_nanoquant only cuts the calibration text, so that both tools see the same tokens:

    python -m venv llmc && llmc/bin/pip install llmcompressor==0.14.0.1 tokenizers -e .
    llmc/bin/python benchmarks/quality/llm_compressor.py models/tiny-nemotron-h llmc-out \
        --calibration-text train.txt

Each variant is a folder of its own:

    rtn-sym, rtn-asym    round to nearest within each group's smallest and largest weight
    mse-sym, mse-asym    round to nearest within the range that llm-compressor's mse observer finds
    gptq-sym, gptq-asym  GPTQ, ranges by the mse observer, llm-compressor's own damping (0.01 of the
                         mean diagonal) and order of columns ("static")
    gptq-minmax-*        the same with ranges from each group's smallest and largest weight, which
                         is what its W4A16 schemes do where no observer is named

All leave the LM head and the embedding alone, as its W4A16 recipes do. A group must divide every
linear's inputs; 32 does in the shipped model, 128 does not.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))  # run as a script

from tiny_model.model import ssd_scan  # noqa: E402

from vllm_nanoquant.calibration.skeleton import lift_step_limits  # noqa: E402
from vllm_nanoquant.calibration.text import load_sequences, load_tokenizer  # noqa: E402
from vllm_nanoquant.files import write_whole  # noqa: E402

VARIANTS = ("rtn-sym", "rtn-asym", "mse-sym", "mse-asym", "gptq-sym", "gptq-asym")
MORE_VARIANTS = ("gptq-minmax-sym", "gptq-minmax-asym")
"""Only made when they are named."""
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
SCAN_CHUNK = 64
"""Of the scan of Mamba layers that stands in for transformers': 30 times as fast, not different."""
RECORD = "llm_compressor.json"
"""Beside the folders: what made each of them."""


def recipe(variant: str, group_size: int, ignore: list[str]) -> Any:
    """The modifier of llm-compressor that makes a variant."""
    from llmcompressor.modifiers.quantization import (  # type: ignore[import-not-found]
        GPTQModifier,
        QuantizationModifier,
    )

    algorithm, *observer, symmetry = variant.split("-")
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": symmetry == "sym",
        "strategy": "group",
        "group_size": group_size,
        "observer": "minmax" if algorithm == "rtn" or observer else "mse",
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    modifier = GPTQModifier if algorithm == "gptq" else QuantizationModifier
    return modifier(config_groups=groups, ignore=ignore)


def calibration(model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `oneshot` for GPTQ: the calibration text as a data set."""
    from datasets import Dataset

    if arguments.calibration_ids is not None:
        sequences = list(torch.from_numpy(np.load(arguments.calibration_ids)))
    else:
        sequences = load_sequences(
            arguments.calibration_text, load_tokenizer(model), arguments.samples, arguments.length
        )
    columns = {
        "input_ids": [ids.tolist() for ids in sequences],
        "attention_mask": [[1] * len(ids) for ids in sequences],
    }
    return {
        "dataset": Dataset.from_dict(columns),
        "num_calibration_samples": len(sequences),
        "max_seq_length": max(len(ids) for ids in sequences),
    }


def scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    *,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    dt_limit: tuple[float, float],
    **_: Any,
) -> torch.Tensor:
    """What transformers' `mamba2_chunk_scan` gives without a cache, fp32 [batch, T, heads, width].

    Args:
        x: values [batch, T, heads, width].
        dt: steps before their bias and softplus [batch, T, heads].
        a: rates of decay [heads].
        b: input maps [batch, T, groups, state].
        c: output maps, the same.
        D: of x that is added [heads].
        dt_bias: [heads].
        dt_limit: least and largest step.
    """
    heads = (b.shape[2], x.shape[2] // b.shape[2])
    steps = torch.nn.functional.softplus(dt + dt_bias.to(dt.dtype)).clamp(*dt_limit).float()
    values = x.float().unflatten(2, heads)
    y = ssd_scan(values, steps.unflatten(2, heads), a.view(heads), b.float(), c.float(), SCAN_CHUNK)
    return y.flatten(2, 3) + D[:, None] * x.float()


def load_model(folder: Path) -> Any:
    """The stock model by transformers, in bf16, as vLLM computes it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    if config.model_type == "nemotron_h":
        from transformers.models.nemotron_h import modeling_nemotron_h

        modeling_nemotron_h.mamba2_chunk_scan = scan
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.bfloat16)
    lift_step_limits(model)
    return model


def compress(variant: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Make one variant's folder; what made it, for the record."""
    from llmcompressor import oneshot  # type: ignore[import-not-found]

    model = load_model(arguments.model)
    use_cache, model.config.use_cache = model.config.use_cache, False
    options: dict[str, Any] = {}
    record: dict[str, Any] = {"group_size": arguments.group_size, "ignore": arguments.ignore}
    if variant.startswith("gptq"):
        options = calibration(arguments.model, arguments)
        tokens = sum(len(ids) for ids in options["dataset"]["input_ids"])
        record["calibration_tokens"] = tokens
    start = time.perf_counter()
    modifier = recipe(variant, arguments.group_size, arguments.ignore)
    oneshot(model=model, recipe=modifier, **options)
    record["seconds"] = round(time.perf_counter() - start, 1)
    model.config.use_cache = use_cache
    target = arguments.output / variant
    model.save_pretrained(target, save_compressed=True)
    for name in TOKENIZER:
        shutil.copy(arguments.model / name, target / name)
    return record


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of the stock checkpoint")
    parser.add_argument("output", type=Path, help="folder to make the variants' folders in")
    parser.add_argument("--calibration-text", type=Path, help="plain text, for gptq")
    parser.add_argument("--calibration-ids", type=Path, help="token ids instead, a .npy file")
    parser.add_argument("--samples", type=int, default=32, help="sequences of it")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS + MORE_VARIANTS, default=list(VARIANTS)
    )
    parser.add_argument("--ignore", nargs="+", default=["lm_head"], help="names, or re:REGEX")
    arguments = parser.parse_args()
    needs_text = any(variant.startswith("gptq") for variant in arguments.variants)
    if needs_text and arguments.calibration_text is None and arguments.calibration_ids is None:
        parser.error("gptq needs --calibration-text or --calibration-ids")
    # Before the first variant, which takes minutes: the record must find its folder.
    arguments.output.mkdir(parents=True, exist_ok=True)
    packages = ("llmcompressor", "compressed-tensors", "transformers", "torch")
    records: dict[str, Any] = {"packages": {name: version(name) for name in packages}}
    for variant in arguments.variants:
        records[variant] = compress(variant, arguments)
        text = json.dumps(records, indent=1) + "\n"
        write_whole(arguments.output / RECORD, text)


if __name__ == "__main__":
    main()
