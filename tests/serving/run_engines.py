# SPDX-License-Identifier: Apache-2.0
"""Start vLLM engines one after the other in this process and report on each as JSON.

usage: run_engines.py JOBS.json REPORT.json

A job: {"name", "engine": arguments of LLM(), "prompts": [text], "windows": [[token id]],
"ids": [[token id]], "environment": {}, "reload": false, "digests": false}. Its report: the greedy
continuations, their token ids, the logits of every step and the tokens chosen after "ids", the
summed negative log likelihood of the windows and the number of tokens in it, the shapes of the int4
parameters, whether reloading changed a weight, digests of all weights by rank where asked for, or
the error that ended it. A line on standard output marks where each job's log
begins. Running them in one process is quick, and is itself a test: an engine must not leave a trace
in the next.
"""

import json
import os
import sys
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = os.environ.get("NANOQUANT_TEST_MULTIPROCESS", "0")

if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
    import second_runner

    second_runner.prepare()

from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from weight_digests import digests


def negative_log_likelihood(llm, windows):
    """Sum over the windows of -log p(token | the ones before it), and the number of tokens."""
    asked = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    total, count = 0.0, 0
    prompts = [{"prompt_token_ids": window} for window in windows]
    for window, answer in zip(windows, llm.generate(prompts, asked, use_tqdm=False), strict=True):
        for token, choices in zip(window[1:], answer.prompt_logprobs[1:], strict=True):
            total -= choices[token].logprob
            count += 1
    return total, count


def greedy_logits(llm, prompts):
    """Logits [vocabulary] of each step, [prompts][steps], and the token chosen in each.

    Needs an engine with `LOGITS` of engines.py.
    """
    asked = SamplingParams(temperature=0, max_tokens=6, logprobs=-1, detokenize=False)
    asked.ignore_eos = True
    prompts = [{"prompt_token_ids": ids} for ids in prompts]
    answers = [answer.outputs[0] for answer in llm.generate(prompts, asked, use_tqdm=False)]
    logits = [
        [[step[token].logprob for token in sorted(step)] for step in answer.logprobs]
        for answer in answers
    ]
    return logits, [list(answer.token_ids) for answer in answers]


def int4_parameters(model):
    return {
        name: list(parameter.shape)
        for name, parameter in model.named_parameters()
        if name.endswith("weight_packed")
    }


def snapshot(model):
    return {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}


def reload_keeps_every_byte(llm):
    """Whether reload_weights gives every parameter the same bytes at the same address."""
    (before,) = llm.apply_model(snapshot)
    llm.collective_rpc("reload_weights")
    (after,) = llm.apply_model(snapshot)
    return before.keys() == after.keys() and all(
        before[name][0] == after[name][0] and before[name][1].equal(after[name][1])
        for name in before
    )


def run(job):
    llm = LLM(**job["engine"])
    asked = SamplingParams(temperature=0, max_tokens=24)
    answers = llm.generate(job["prompts"], asked, use_tqdm=False) if job.get("prompts") else []
    report = {
        "texts": [answer.outputs[0].text for answer in answers],
        "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
    }
    if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0":
        report["int4"] = llm.apply_model(int4_parameters)[0]
    if job.get("ids"):
        report["logits"], report["chosen"] = greedy_logits(llm, job["ids"])
    if job.get("digests"):
        report["digests"] = llm.apply_model(digests)
    if job.get("reload"):
        report["reload_keeps_every_byte"] = reload_keeps_every_byte(llm)
    if job.get("windows"):
        report["nll"], report["nll_tokens"] = negative_log_likelihood(llm, job["windows"])
    return report


def main():
    reports = {}
    for job in json.loads(Path(sys.argv[1]).read_text()):
        print(f"=== job {job['name']}", flush=True)
        os.environ.update(job.get("environment", {}))
        try:
            reports[job["name"]] = run(job)
        except Exception as error:
            reports[job["name"]] = {"error": f"{type(error).__name__}: {error}"}
        # As vLLM asks of a process that starts engine after engine: it also thaws the environment
        # variables that an engine froze.
        cleanup_dist_env_and_memory()
        for name in job.get("environment", {}):
            os.environ.pop(name, None)
        sys.stdout.flush()
    Path(sys.argv[2]).write_text(json.dumps(reports))


if __name__ == "__main__":
    main()
