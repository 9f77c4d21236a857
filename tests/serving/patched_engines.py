# SPDX-License-Identifier: Apache-2.0
"""Engines that are patched while they run, in a fresh process, and what they are compared with."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.dequantized import dequantized

from .engines import job

RUNNER = Path(__file__).with_name("run_patched.py")
# Every module that preset `full` makes int4, by the last part of its name in the checkpoint.
FULL = {"in_proj", "out_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj"}
FULL |= {"lm_head"}


def patched_job(name, model, patches=(), options=None, **rest):
    """A job for run_patched.py; `options` is our quantization_config, None for plain BF16."""
    return job(name, model, options, **rest) | {"patches": list(patches)}


def run_patched(jobs, folder, environment=None, timeout=850):
    """Reports by job name, each with its part of the log and its logits [prompts, tokens, V]."""
    folder.mkdir(exist_ok=True)
    jobs_file = folder / "jobs.json"
    jobs_file.write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, str(RUNNER), str(jobs_file), str(folder)],
        # Compiled artefacts of an earlier run would be another test.
        env=os.environ | {"VLLM_CACHE_ROOT": str(folder / "cache")} | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    report_file = folder / "reports.json"
    if not report_file.exists():
        raise AssertionError(f"the engines died:\n{done.stdout[-8000:]}")
    reports = json.loads(report_file.read_text())
    for name, report in reports.items():
        assert "error" not in report, f"{name}: {report['error']}\n{done.stdout[-8000:]}"
        report["logits"] = torch.load(folder / f"{name}.pt")
    for part in done.stdout.split("=== job ")[1:]:
        name, *lines = part.splitlines()
        reports[name]["log"] = lines
    return reports


def write_dequantized(source, target, dtype=torch.bfloat16):
    """A checkpoint whose weights have the values of int4 by preset `full`, rounded to `dtype`."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if name.removesuffix(".weight").rsplit(".", 1)[-1] in FULL:
            tensors[name] = dequantized(tensor).to(dtype)
    save_file(tensors, target / "model.safetensors")
    return target


def mean_relative_error(found, expected):
    """Mean |found - expected| / mean |expected|."""
    return float((found - expected).abs().mean() / expected.abs().mean())


def same_until_a_tie(found, expected, logits):
    """Number of tokens before the two part, which they may where bf16 cannot tell the best two."""
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        if one != other:
            best, second = logits[index].topk(2).values
            assert best - second <= best * 2**-7
            return index
    return len(expected)
