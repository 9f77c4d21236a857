# SPDX-License-Identifier: Apache-2.0
"""Engines that are patched while they run, in a fresh process, and what they are compared with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from .engines import job

RUNNER = Path(__file__).with_name("run_patched.py")


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
