# SPDX-License-Identifier: Apache-2.0
"""Start one engine, save logits, time decoding. Run by parallel.py, one process an engine."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from vllm import LLM, SamplingParams

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.end_to_end.engine import decode_rate, prompts, seconds

PROMPTS, PROMPT_TOKENS = 8, 64
TOKENS, REPEATS = 128, 3


def first_logits(llm: LLM) -> torch.Tensor:
    """Logits of the token after each prompt, less their mean: fp32 [prompts, vocabulary]."""
    asked = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, detokenize=False)
    answers = llm.generate(prompts(PROMPTS, PROMPT_TOKENS, 3), asked, use_tqdm=False)
    rows = []
    for answer in answers:
        found = answer.outputs[0].logprobs[0]
        row = torch.full((llm.model_config.get_vocab_size(),), torch.nan)
        row[torch.tensor(list(found))] = torch.tensor([each.logprob for each in found.values()])
        rows.append(row - row.mean())
    return torch.stack(rows)


def main() -> None:
    """Run the job that parallel.py gives."""
    job = json.loads(sys.argv[1])
    start = time.perf_counter()
    llm = LLM(**job["engine"])
    result: dict[str, Any] = {"start_seconds": time.perf_counter() - start}
    save_file({"logits": first_logits(llm)}, job["logits"])
    if job["batches"]:
        print("timing", flush=True)
        seconds(llm, prompts(max(job["batches"]), PROMPT_TOKENS, 1), TOKENS)
        result["decode_tokens_per_second"] = {
            size: decode_rate(llm, size, TOKENS, REPEATS) for size in job["batches"]
        }
    Path(job["figures"]).write_text(json.dumps(result))
    print("timed", flush=True)


if __name__ == "__main__":
    main()
