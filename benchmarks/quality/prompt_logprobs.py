# SPDX-License-Identifier: Apache-2.0
"""Serve one checkpoint and write the log probabilities of every token at every place of some text.

    python benchmarks/quality/prompt_logprobs.py JOB.json RESULT.safetensors

A job: {"engine": arguments of LLM(), "windows": [[token id]]}, all windows of one length T. The
result: `logprobs`, fp32 [windows, T - 1, vocabulary]; row t is the prediction of token t + 1. A
process of its own, because vLLM reads VLLM_PLUGINS once.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch
from safetensors.torch import save_file
from vllm import LLM, SamplingParams

ALL = -1


def window_logprobs(answer: Any, vocabulary: int) -> torch.Tensor:
    """The predictions of one window, fp32 [T - 1, vocabulary].

    Raises:
        ValueError: a token has no log probability.
    """
    rows = torch.full((len(answer.prompt_logprobs) - 1, vocabulary), torch.nan)
    for row, choices in zip(rows, answer.prompt_logprobs[1:], strict=True):
        tokens = torch.tensor(list(choices))
        row[tokens] = torch.tensor([choice.logprob for choice in choices.values()])
    if rows.isnan().any():
        raise ValueError(f"{int(rows.isnan().sum())} log probabilities are missing")
    return rows


def main() -> None:
    """Command line."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    llm = LLM(**job["engine"], max_logprobs=ALL)
    vocabulary = llm.model_config.get_vocab_size()
    asked = SamplingParams(max_tokens=1, prompt_logprobs=ALL, detokenize=False)
    prompts = [{"prompt_token_ids": window} for window in job["windows"]]
    answers = llm.generate(prompts, asked, use_tqdm=False)
    rows = torch.stack([window_logprobs(answer, vocabulary) for answer in answers])
    save_file({"logprobs": rows}, sys.argv[2])


if __name__ == "__main__":
    main()
