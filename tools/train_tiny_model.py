#!/usr/bin/env python3
"""Train the small Nemotron-H model in ``models/tiny-nemotron-h``, from text to checkpoint.

One command does everything: it fetches the text, trains the tokenizer and the model, writes the
checkpoint and measures its held-out perplexity. Run it again to resume after an interruption.

    python tools/train_tiny_model.py --out models/tiny-nemotron-h

It needs torch, tokenizers, safetensors and tqdm; one GPU for the full run, a CPU to try it.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tiny_model.export import export, load_exported, write_json
from tiny_model.model import TinyConfig
from tiny_model.text import load_corpus
from tiny_model.tokens import generate, load_prepared, perplexity, prepare, window_nll
from tiny_model.training import PROMPTS, Trainer, TrainOptions

EVAL_WINDOW = 512


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the finished checkpoint")
    add("--work-dir", type=Path, default=Path("build/tiny-model"), help="training state")
    add("--data-dir", type=Path, help="prepared text and tokenizer (default: WORK_DIR/data)")
    add("--text", type=Path, nargs="+", default=[], help="plain texts instead of the novels")
    add("--prepare-only", action="store_true", help="fetch and tokenize, then stop")
    add("--steps", type=int, default=12000)
    add("--time-limit", type=float, default=3600.0, help="seconds of training")
    add("--batch-size", type=int, default=16, help="windows in a step")
    add("--seq-len", type=int, default=1024, help="tokens in a window")
    add("--learning-rate", type=float, default=3e-3)
    add("--weight-decay", type=float, default=0.5)
    add("--dropout", type=float, default=0.3)
    add("--warmup", type=int, default=200, help="steps of rising learning rate")
    add("--ema-decay", type=float, default=0.999)
    add("--eval-every", type=int, default=100, help="steps between validations")
    add("--save-every", type=float, default=60.0, help="seconds between checkpoints")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU only")
    return parser.parse_args()


def train_options(args: argparse.Namespace) -> TrainOptions:
    """Pick the training options out of the command line."""
    compiled = args.device.startswith("cuda") if args.compile is None else args.compile
    fields = {k: v for k, v in vars(args).items() if k in TrainOptions.__annotations__}
    return TrainOptions(**{**fields, "compile": compiled})


def machine() -> dict[str, str]:
    """Describe what the training ran on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    packages = ("torch", "tokenizers", "safetensors")
    return {
        "gpu": gpu,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def final_report(trainer: Trainer, out: Path) -> dict[str, Any]:
    """Measure the exported checkpoint on the held-out text and collect the whole record."""
    data, options = trainer.data, trainer.options
    model = load_exported(out, trainer.model.cfg).to(options.device)
    ids = torch.tensor(data.tokenizer.encode(data.heldout).ids, device=options.device)
    heldout = perplexity(window_nll(model, ids, EVAL_WINDOW), ids, data.tokenizer)
    samples = []
    for prompt in PROMPTS:
        for temperature in (0.0, 0.7):
            text = generate(model, data.tokenizer, prompt, 100, temperature, options.seed)
            samples.append({"prompt": prompt, "temperature": temperature, "text": text})
    return {
        "model": asdict(trainer.model.cfg),
        "parameters": sum(p.numel() for p in model.parameters()),
        "options": asdict(options),
        "machine": machine(),
        "train_tokens": len(data.train),
        "validation_tokens": len(data.validation),
        "steps_done": trainer.step,
        "tokens_seen": trainer.step * options.batch_size * options.seq_len,
        "seconds": round(trainer.seconds, 1),
        "best_validation_loss": round(trainer.best_loss, 4),
        "heldout": {"window": EVAL_WINDOW, "weights": "bf16", "compute": "fp32", **heldout},
        "samples": samples,
        "curve": trainer.curve,
    }


def main() -> int:
    """Prepare the data unless that is done, train, export, measure."""
    args = parse_arguments()
    cfg = TinyConfig()
    data_dir = args.data_dir or args.work_dir / "data"
    if not (data_dir / "chapters.json").exists():
        prepare(load_corpus(args.text), cfg.vocab_size, data_dir)
    data = load_prepared(data_dir)
    print(f"{len(data.train)} training tokens, {len(data.validation)} for validation")
    if args.prepare_only:
        return 0
    # Plain fp32 products would be needlessly exact next to bf16 ones.
    torch.set_float32_matmul_precision("high")
    trainer = Trainer(cfg, data, train_options(args))
    trainer.run(args.work_dir / "checkpoint.pt")
    torch.set_float32_matmul_precision("highest")
    export(trainer.best_weights, cfg, data_dir, args.out)
    report = final_report(trainer, args.out)
    write_json(args.out / "training.json", report)
    print(json.dumps({k: v for k, v in report.items() if k != "curve"}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
