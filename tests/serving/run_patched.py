# SPDX-License-Identifier: Apache-2.0
"""Start vLLM engines one after the other, patch them where a job says so, and report as JSON.

usage: run_patched.py JOBS.json FOLDER

A job: {"name", "engine": arguments of LLM(), "prompts": [text], "patches": [["llm", "worker" or
"model": what is patched, options of patch_nemotron_h]], "refused": as "patches", "digests": false}.
Its report: the greedy tokens before ("before") and after the patches, a report of each patch, the
errors of what is to be refused, digests of all weights, the number of CUDA graphs captured by this
process since the model was last compiled, or the error that ended it. FOLDER/reports.json holds
the reports, FOLDER/NAME.pt the logits [prompts, tokens, vocabulary] of the last answers.
"""

import json
import os
import sys
import traceback
from dataclasses import asdict
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = os.environ.get("NANOQUANT_TEST_MULTIPROCESS", "0")

import torch
from vllm import LLM, SamplingParams
from vllm.compilation.counter import compilation_counter
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from weight_digests import digests

from vllm_nanoquant import patch_nemotron_h

ASKED = SamplingParams(temperature=0, max_tokens=24, logprobs=-1, detokenize=False)


def patch(llm, what, options):
    """The report of one patch."""
    if what == "worker":
        (report,) = llm.collective_rpc(lambda worker: patch_nemotron_h(worker, **options))
    elif what == "model":
        (report,) = llm.apply_model(lambda model: patch_nemotron_h(model, **options))
    else:
        report = patch_nemotron_h(llm, **options)
    return asdict(report) | {"text": str(report), "replaced": report.replaced}


def refusal(llm, what, options):
    try:
        patch(llm, what, options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def refusal_while_running(llm, prompt):
    llm.llm_engine.add_request("running", prompt, SamplingParams(max_tokens=1))
    try:
        return refusal(llm, "llm", {})
    finally:
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()


def answer(llm, prompts):
    """Greedy tokens and the logits that they were chosen by, [tokens, vocabulary] per prompt."""
    outputs = [given.outputs[0] for given in llm.generate(prompts, ASKED, use_tqdm=False)]
    tokens = [list(output.token_ids) for output in outputs]
    logits = [
        [[step[token].logprob for token in range(len(step))] for step in output.logprobs]
        for output in outputs
    ]
    return tokens, torch.tensor(logits)


def run(job, folder):
    llm = LLM(logprobs_mode="raw_logits", max_logprobs=-1, **job["engine"])
    prompts = job["prompts"]
    report = {"refused": [refusal(llm, *asked) for asked in job.get("refused", [])]}
    if "patches" in job:
        report["before"], _ = answer(llm, prompts)
        report["while running"] = refusal_while_running(llm, prompts[0])
    report["patches"] = [patch(llm, *asked) for asked in job.get("patches", [])]
    report["graphs"] = compilation_counter.num_cudagraph_captured
    report["tokens"], logits = answer(llm, prompts)
    torch.save(logits, folder / f"{job['name']}.pt")
    if job.get("digests"):
        report["digests"] = llm.apply_model(digests)
    return report


def main():
    folder = Path(sys.argv[2])
    reports = {}
    for job in json.loads(Path(sys.argv[1]).read_text()):
        print(f"=== job {job['name']}", flush=True)
        try:
            reports[job["name"]] = run(job, folder)
        except Exception as error:
            traceback.print_exc()
            reports[job["name"]] = {"error": f"{type(error).__name__}: {error}"}
        cleanup_dist_env_and_memory()
    (folder / "reports.json").write_text(json.dumps(reports))


if __name__ == "__main__":
    main()
