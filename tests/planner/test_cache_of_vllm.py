# SPDX-License-Identifier: Apache-2.0
"""The cache as vLLM's own code lays it out, for the geometries of real models, without weights."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import vllm
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
from vllm.model_executor.models.nemotron_h import NemotronHForCausalLM
from vllm.platforms.interface import Platform
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_nanoquant.planner.fit import fit
from vllm_nanoquant.planner.settings import Settings, caching_of
from vllm_nanoquant.planner.source import read_facts
from vllm_nanoquant.planner.weights import Ranks
from vllm_nanoquant.recipe import Recipe

GEOMETRIES = Path("benchmarks/geometry").resolve()
DTYPES = {"auto": torch.bfloat16, "fp8": torch.float8_e4m3fn}
MEMORY = 24 << 30

pytestmark = [pytest.mark.compat, pytest.mark.slow]


class Mixer(MambaMixer2):
    """A Mamba layer with a state and nothing else."""

    def __init__(self, config):
        torch.nn.Module.__init__(self)
        self.vllm_config = config

    def get_state_shape(self):
        return NemotronHForCausalLM.get_mamba_state_shape_from_config(self.vllm_config)

    def get_state_dtype(self):
        return NemotronHForCausalLM.get_mamba_state_dtype_from_config(self.vllm_config)


def vllm_cache(model, ranks, length, ssm, kv, prefixes, available):
    """vLLM's block size, cache configuration and concurrency on a GPU with so many bytes left."""
    config = EngineArgs(
        model=str(model),
        skip_tokenizer_init=True,
        max_model_len=length,
        enable_prefix_caching=prefixes,
        mamba_ssm_cache_dtype=ssm,
        kv_cache_dtype=kv,
    ).create_engine_config()
    config.parallel_config.tensor_parallel_size = ranks
    cache, attention = config.cache_config, config.model_config
    cache.block_size = 16  # a GPU's, not the CPU's
    cache.kv_cache_layout = "LBNHC"  # FlashAttention's; vLLM knows layouts from 0.31 on
    Platform._align_hybrid_block_size(config, FlashAttentionBackend)
    specs = {}
    for index, letter in enumerate(attention.hf_config.hybrid_override_pattern):
        if letter == "M":
            specs[f"layers.{index}"] = Mixer(config).get_kv_cache_spec(config)
        elif letter == "*":
            specs[f"layers.{index}"] = FullAttentionSpec(
                block_size=cache.block_size,
                num_kv_heads=attention.get_num_kv_heads(config.parallel_config),
                head_size=attention.get_head_size(),
                dtype=DTYPES[kv],
            )
    groups = kv_cache_utils.get_kv_cache_groups(config, specs)
    found = kv_cache_utils.get_kv_cache_config_from_groups(config, groups, available)
    concurrency = kv_cache_utils.get_max_concurrency_for_kv_cache_config(config, found)
    return SimpleNamespace(tokens=cache.block_size, config=found, concurrency=concurrency)


@pytest.mark.parametrize(
    ("geometry", "ranks", "length", "ssm", "kv", "prefixes"),
    [
        ("nemotron-nano-9b-v2", 1, 131072, "float32", "auto", False),
        ("nemotron-nano-9b-v2", 2, 4096, "float32", "auto", True),
        ("nemotron-nano-9b-v2", 1, 5000, "bfloat16", "fp8", True),
        ("nemotron-nano-9b-v2", 8, 1312, "float16", "auto", False),
        ("nemotron-3-nano-30b-a3b", 1, 262144, "float32", "auto", True),
        ("nemotron-3-nano-30b-a3b", 4, 20000, "float32", "fp8", False),
    ],
)
def test_blocks_are_those_of_vllm(geometry, ranks, length, ssm, kv, prefixes):
    check(GEOMETRIES / geometry, ranks, length, ssm, kv, prefixes)


def test_a_model_with_almost_as_many_layers_of_both_kinds(tmp_path):
    config = json.loads((GEOMETRIES / "nemotron-nano-9b-v2" / "config.json").read_text())
    config |= {"hybrid_override_pattern": "M*M*-M*M*M", "num_hidden_layers": 10}
    (tmp_path / "config.json").write_text(json.dumps(config))
    check(tmp_path, 1, 20000, "float32", "auto", False)


def check(model, ranks, length, ssm, kv, prefixes):
    settings = Settings(
        gpu_memory=MEMORY,
        ranks=Ranks(ranks),
        max_model_len=length,
        kv_cache_dtype=kv,
        mamba_ssm_cache_dtype=ssm,
        prefixes=caching_of(vllm.__version__, prefixes),
    )
    cache = fit(read_facts(model), Recipe(), settings).cache
    available = 10 << 30
    theirs = vllm_cache(model, ranks, length, ssm, kv, prefixes, available)
    blocks = available // cache.block_bytes
    assert cache.block_tokens == theirs.tokens
    assert blocks == theirs.config.num_blocks
    assert cache.attention_groups + cache.mamba_groups == len(theirs.config.kv_cache_groups)
    assert blocks / cache.blocks_of(length) == pytest.approx(theirs.concurrency)


def test_the_default_for_prefixes_is_that_of_vllm():
    args = EngineArgs(
        model=str(GEOMETRIES / "nemotron-nano-9b-v2"), skip_tokenizer_init=True, max_model_len=512
    )
    on = args.create_engine_config().cache_config.enable_prefix_caching
    assert caching_of(vllm.__version__, None).on == on
