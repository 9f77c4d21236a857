# SPDX-License-Identifier: Apache-2.0
"""One tensor-parallel rank of several, pretended in this process."""

import contextlib

import pytest
import torch
import vllm.model_executor.layers.linear as vllm_linear
import vllm.model_executor.layers.vocab_parallel_embedding as vllm_vocabulary
import vllm.model_executor.parameter as vllm_parameter
from vllm.config import VllmConfig, set_current_vllm_config

RANKS = [(0, 1), (0, 2), (1, 2), (1, 4), (3, 4), (5, 8)]
VOCABULARY_RANKS = [(0, 1), (0, 2), (1, 2), (3, 4), (5, 8), (7, 8)]


@contextlib.contextmanager
def rank_of(tp_rank, tp_size):
    """A vLLM that believes it is one rank of several."""
    with pytest.MonkeyPatch.context() as patch, set_current_vllm_config(VllmConfig()):
        for module in (vllm_linear, vllm_parameter, vllm_vocabulary):
            patch.setattr(module, "get_tensor_model_parallel_rank", lambda: tp_rank)
            patch.setattr(module, "get_tensor_model_parallel_world_size", lambda: tp_size)
        yield


def random_weight(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).to(torch.bfloat16)


def rows_of(weight, parts, tp_rank, tp_size):
    """The rows of a rank when each part is split over the ranks on its own."""
    return torch.cat([part.chunk(tp_size)[tp_rank] for part in weight.split(parts)])
