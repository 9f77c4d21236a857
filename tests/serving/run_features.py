# SPDX-License-Identifier: Apache-2.0
"""Try features of vLLM on engines in this process, one after the other, and report on each.

usage: run_features.py JOBS.json FOLDER

A job: {"name", "engine": arguments of LLM(), "steps": [...]}. A step: {"ask": label, "prompts":
[[token id]], "tokens": how many, "logits": whether to keep them, "adapters": [path or null], one
for each prompt}, {"reload": true}, {"sleep": level} (asleep and woken again, the weights reloaded
after level 2), or {"digest": label}, of all weights.

FOLDER/NAME.json is written when a job ends, whatever the job before or after it does: the greedy
token ids and the digests by label, vLLM's counters, GPU memory in use awake and asleep, or the
error that ended the job. FOLDER/NAME.LABEL.safetensors has the logits [tokens, vocabulary] of each
prompt. A line on standard output marks where each job's log begins.
"""

import json
import os
import sys
import traceback
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch
from safetensors.torch import save_file
from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest
from weight_digests import digests


def ask(llm, step, file):
    """Greedy token ids of each prompt; their logits go to `file`."""
    asked = SamplingParams(
        temperature=0,
        max_tokens=step["tokens"],
        ignore_eos=True,
        logprobs=-1 if step["logits"] else None,
        detokenize=False,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in step["prompts"]]
    paths = step.get("adapters")
    adapters = paths and [path and LoRARequest("adapter", 1, path) for path in paths]
    answers = [
        answer.outputs[0]
        for answer in llm.generate(prompts, asked, use_tqdm=False, lora_request=adapters)
    ]
    if step["logits"]:
        save_file({str(i): logits_of(answer) for i, answer in enumerate(answers)}, file)
    return [list(answer.token_ids) for answer in answers]


def logits_of(answer):
    """float32 [tokens, vocabulary]."""
    rows = [[row[token].logprob for token in sorted(row)] for row in answer.logprobs]
    return torch.tensor(rows)


def sleep(llm, level, report):
    """Sleep and wake up; the weights are gone after level 2 and are read again."""
    memory = report.setdefault("memory", [])
    memory.append(used_memory())
    llm.sleep(level=level)
    memory.append(used_memory())
    if level == 1:
        llm.wake_up()
        return
    llm.wake_up(tags=["weights"])
    llm.collective_rpc("reload_weights")
    llm.wake_up(tags=["kv_cache"])


def used_memory():
    free, total = torch.cuda.mem_get_info()
    return total - free


def counters(llm):
    """vLLM's counters that are single numbers, such as hits of the prefix cache, by name."""
    return {
        metric.name: metric.value
        for metric in llm.get_metrics()
        if isinstance(getattr(metric, "value", None), int | float)
    }


def run(job, folder, report):
    llm = LLM(**job["engine"])
    report["block_size"] = llm.llm_engine.vllm_config.cache_config.block_size
    for step in job["steps"]:
        if "ask" in step:
            file = folder / f"{job['name']}.{step['ask']}.safetensors"
            report["answers"][step["ask"]] = ask(llm, step, file)
        elif "digest" in step:
            (report["digests"][step["digest"]],) = llm.apply_model(digests)
        elif "sleep" in step:
            sleep(llm, step["sleep"], report)
        else:
            llm.collective_rpc("reload_weights")
    report["counters"] = counters(llm)


def main():
    folder = Path(sys.argv[2])
    for job in json.loads(Path(sys.argv[1]).read_text()):
        print(f"=== job {job['name']}", flush=True)
        report = {"answers": {}, "digests": {}}
        try:
            run(job, folder, report)
        except Exception as error:
            # The frames of the error hold the engine.
            traceback.print_exc()
            report["error"] = f"{type(error).__name__}: {error}"
        (folder / f"{job['name']}.json").write_text(json.dumps(report))
        cleanup_dist_env_and_memory()
        sys.stdout.flush()


if __name__ == "__main__":
    main()
