#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Train the 94-million-parameter Nemotron-H model that docs/evidence.md measures int4 on.

    python tools/prepare_small_corpus.py --out build/small-corpus
    python tools/train_small_model.py --data build/small-corpus --out build/small-nemotron-h \
        --work build/small-training --minutes 9

The schedule follows the clock: whatever the GPU's speed, the training ends fully annealed --minutes
after the start. Killed before, the same command with other minutes takes it up and ends it. It
needs torch, numpy, tokenizers, safetensors and tqdm. --geometry miniature tries it on a CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from small_model.data import Prepared, load
from small_model.geometry import GEOMETRIES
from small_model.trainer import Trainer, TrainOptions, context_of, say
from tiny_model.export import export, load_exported, write_json
from tiny_model.tokens import generate, perplexity, window_nll
from train_tiny_model import machine

PROMPTS = ("The purpose of this chapter is to", "If the file does not exist,", "She was not at all")
_SAMPLE_TOKENS = 64
_SCORED_TOKENS = 200_000


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    cuda = torch.cuda.is_available()
    add("--data", type=Path, required=True, help="folder that prepare_small_corpus.py made")
    add("--out", type=Path, required=True, help="folder for the finished checkpoint")
    add("--work", type=Path, required=True, help="folder for the state of the training")
    add("--report", type=Path, help="JSON file for curve and figures, beside OUT/training.json")
    add("--geometry", choices=GEOMETRIES, default="small")
    add("--minutes", type=float, default=9.0, help="from the start to the end of the training")
    add("--batch-tokens", type=int, default=65536, help="tokens of a step")
    add("--micro-tokens", type=int, default=65536, help="of them together, at most")
    add("--seq-len", type=int, default=2048, help="tokens of a window")
    add("--long-len", type=int, default=16384, help="tokens of a window in the last part")
    add("--long-share", type=float, default=0.2, help="how much of the training that part is")
    add("--peak", type=float, default=2e-3, help="highest learning rate")
    add("--weight-decay", type=float, default=0.1)
    add("--eval-every", type=float, default=25.0, help="seconds between held-out measurements")
    add("--save-every", type=float, default=90.0, help="seconds between checkpoints")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if cuda else "cpu")
    add("--compile", action=argparse.BooleanOptionalAction, default=cuda)
    return parser.parse_args()


def report(trainer: Trainer, data: Prepared, out: Path) -> dict[str, Any]:
    """Measure the exported checkpoint on the held-out pages and collect the whole record."""
    options = trainer.options
    model = load_exported(out, trainer.model.cfg).to(options.device)
    ids = torch.from_numpy(data.heldout[:_SCORED_TOKENS].astype("int64")).to(options.device)
    losses = window_nll(model, ids, options.seq_len, batch=4)
    samples = [
        {
            "prompt": prompt,
            "text": generate(model, data.tokenizer, prompt, _SAMPLE_TOKENS, 0.7, options.seed),
        }
        for prompt in PROMPTS
    ]
    return {
        "model": asdict(trainer.model.cfg),
        "parameters": sum(p.numel() for p in model.parameters()),
        "options": asdict(options),
        "machine": machine(),
        "data": data.about,
        "steps": trainer.step,
        "tokens_seen": trainer.tokens,
        "steps_left_out": trainer.left_out,
        "tokens_per_second": round(trainer.speed),
        "seconds": round(time.monotonic() - trainer.started, 1),
        "heldout": {
            "window": options.seq_len,
            "weights": "bf16",
            "compute": "fp32",
            **perplexity(losses, ids, data.tokenizer),
        },
        "samples": samples,
        "curve": trainer.curve,
    }


def main() -> int:
    """Train, export, measure."""
    args = parse_arguments()
    options = TrainOptions(
        **{key: value for key, value in vars(args).items() if key in TrainOptions.__annotations__}
    )
    data = load(args.data)
    say(f"{len(data.train)} training tokens, {len(data.heldout)} held out, {len(data.long)} long")
    # Plain fp32 products would be needlessly exact next to bf16 ones.
    torch.set_float32_matmul_precision("high")
    trainer = Trainer(GEOMETRIES[args.geometry], data, options)
    trainer.run(args.work / "checkpoint.pt")
    torch.set_float32_matmul_precision("highest")
    weights = {name: tensor.cpu() for name, tensor in trainer.model.state_dict().items()}
    export(weights, trainer.model.cfg, args.data, args.out, context_of(options))
    say(f"checkpoint in {args.out}")
    result = report(trainer, data, args.out)
    for path in filter(None, (args.out / "training.json", args.report)):
        write_json(path, result)
    say(json.dumps({k: v for k, v in result.items() if k not in ("curve", "data")}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
