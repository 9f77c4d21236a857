# SPDX-License-Identifier: Apache-2.0
"""Checkpoints, adapters and prompts to try vLLM's features with, and how answers are compared."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from vllm_nanoquant.recipe import Recipe

from .engines import heldout_windows, job

RUNNER = Path(__file__).with_name("run_features.py")
GROUP_SIZE = 128
FULL = {"preset": "full", "group_size": GROUP_SIZE}
TOKENS = 12
RANK = 8
# One step of bf16, in which the LM head rounds, is at most this part of a logit.
TIE = 2**-7


def write_adapter(model, target):
    """Write a random LoRA adapter for every linear layer, large enough to change the text."""
    generator = torch.Generator().manual_seed(1)
    tensors, modules = {}, set()
    for name, weight in load_file(model / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and Recipe(**FULL).scheme(module, None):
            rows, columns = weight.shape
            size = 0.5 * weight.float().std() / RANK**0.5
            low = torch.randn(RANK, columns, generator=generator)
            high = torch.randn(rows, RANK, generator=generator) * size
            tensors[f"base_model.model.{module}.lora_A.weight"] = low.bfloat16()
            tensors[f"base_model.model.{module}.lora_B.weight"] = high.bfloat16()
            modules.add(module.rpartition(".")[2])
    target.mkdir()
    save_file(tensors, target / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(modules)}
    (target / "adapter_config.json").write_text(json.dumps(config))
    return target


def write_transformer(target):
    """A small random Llama without a tokenizer. It soon repeats itself, but not at once."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(target)
    return target


@cache
def prompts(model):
    """Token ids of held-out text: some sentences, and some of more than a block of the cache.

    The last but one is a prefix of the last, whose second half is another's.
    """
    windows = heldout_windows(model, 800)
    short = [window[:length] for window, length in zip(windows, (17, 40, 100), strict=False)]
    first, second = windows[4:6]
    return {"short": short, "long": [first[:700], first[:600] + second[600:700]]}


def feature_job(name, model, steps, quantized=True, **engine):
    """A job for run_features.py: int4 by preset `full`, unless not `quantized`."""
    settings = {"max_model_len": 1024, "max_logprobs": -1, "logprobs_mode": "raw_logits"}
    settings |= {"disable_log_stats": False, **engine}
    made = job(name, model, FULL if quantized else None, engine=settings)
    return {"name": name, "engine": made["engine"], "steps": steps}


def ask(label, asked, tokens=TOKENS, logits=True, **step):
    """A step of a job: what is answered to these prompts."""
    return {"ask": label, "prompts": asked, "tokens": tokens, "logits": logits, **step}


def engines_at_once():
    """Engines of this small model that the GPU has room for; loading takes a core or two."""
    _, memory = torch.cuda.mem_get_info()
    return max(1, min(len(os.sched_getaffinity(0)) // 2, memory // (16 << 30)))


class Answers(NamedTuple):
    """Greedy continuations of some prompts: token ids, and logits [tokens, vocabulary] of each."""

    tokens: list[list[int]]
    logits: list[torch.Tensor]


class Lab:
    """Runs groups of jobs, each group in a process of its own, when one of its jobs is asked for.

    A process takes longer to start than an engine in it, hence the groups. A job that fails in a
    group is tried once more in a process of its own, so that a job before it cannot be the cause.
    """

    def __init__(self, folder, groups, limit, environment=None):
        """Prepare; `groups` are lists of jobs, `limit` the seconds that one may take."""
        self.folder, self.groups, self.limit = folder, groups, limit
        self.environment = environment or {}
        self._logs = {}

    def run_ahead(self, names, together):
        """Run the groups of these jobs now, so many at the same time."""
        with ThreadPoolExecutor(together) as pool:
            list(pool.map(self._run_group, map(self._group_of, names)))

    def report(self, name):
        """Report of a job, with its part of the log.

        Raises:
            AssertionError: the job failed; the text is its error.
        """
        if name not in self._logs:
            self._run_group(self._group_of(name))
        report = self._read(name)
        if "error" in report:
            raise AssertionError(f"{name}: {report['error']}\n{self._logs[name][-4000:]}")
        return report | {"log": self._logs[name]}

    def answers(self, name, label):
        """What a job answered under a label."""
        tokens = self.report(name)["answers"][label]
        file = self.folder / f"{name}.{label}.safetensors"
        stored = load_file(file) if file.exists() else {}
        return Answers(tokens, [stored[str(i)] for i in range(len(stored))])

    def _group_of(self, name):
        (group,) = [group for group in self.groups if any(job["name"] == name for job in group)]
        return group

    def _run_group(self, group):
        self._run(group)
        for one in group:
            if len(group) > 1 and "error" in self._read(one["name"]):
                self._run([one])

    def _read(self, name):
        file = self.folder / f"{name}.json"
        return json.loads(file.read_text()) if file.exists() else {"error": "it did not end"}

    def _run(self, group):
        jobs_file = self.folder / f"{group[0]['name']}.jobs.json"
        jobs_file.write_text(json.dumps(group))
        limit = self.limit * len(group)
        try:
            log = subprocess.run(
                [sys.executable, str(RUNNER), str(jobs_file), str(self.folder)],
                env=os.environ | self.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=limit,
                check=False,
            ).stdout
        except subprocess.TimeoutExpired as late:
            log = (late.stdout or b"") + f"\nstopped after {limit} s".encode()
        parts = log.decode(errors="replace").split("=== job ")
        self._logs |= {job["name"]: parts[0] for job in group}
        self._logs |= dict(part.split("\n", 1) for part in parts[1:])


def relative_errors(answers, oracle):
    """|logits - oracle's| / |oracle's| of each token up to the first that differs.

    Also returns the prompts, by number, whose tokens differ although the oracle had no tie there:
    its two tokens' logits are more than one step of bf16 apart.
    """
    errors, different = [], []
    for i, (ours, theirs) in enumerate(zip(answers.tokens, oracle.tokens, strict=True)):
        assert len(ours) == len(theirs)
        pairs = zip(ours, theirs, strict=True)
        same = next((at for at, (a, b) in enumerate(pairs) if a != b), len(ours))
        if same < len(ours):
            top, other = oracle.logits[i][same][[theirs[same], ours[same]]].tolist()
            if top - other > TIE * abs(top):
                different.append(i)
        if answers.logits:
            exact = oracle.logits[i][: same + 1]
            distance = (answers.logits[i][: same + 1] - exact).norm(dim=1)
            errors += (distance / exact.norm(dim=1)).tolist()
    return errors, different


def assert_agree(answers, oracle, limit):
    """Assert that logits agree within `limit` in the mean, and tokens except at ties."""
    errors, different = relative_errors(answers, oracle)
    error = sum(errors) / max(1, len(errors))
    print(f"mean relative error of the logits {error:.2e}")
    assert error <= limit, f"the logits' mean relative error is {error:.2e}, above {limit:.0e}"
    assert not different, f"other tokens than the oracle's for the prompts {different}"
