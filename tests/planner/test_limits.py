# SPDX-License-Identifier: Apache-2.0
"""Cache and limits: by hand for the 9B geometry, by brute force for random ones."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_nanoquant.checkpoint.errors import UsageError
from vllm_nanoquant.planner import Limits, PlanError, suggest_limits
from vllm_nanoquant.planner.cache import PrefixCaching, cache_of
from vllm_nanoquant.planner.fit import fit
from vllm_nanoquant.planner.mixers import Attention, Mamba
from vllm_nanoquant.planner.numbers import GIB, MIB
from vllm_nanoquant.planner.settings import Settings, caching_of, memory_for
from vllm_nanoquant.planner.source import read_facts
from vllm_nanoquant.planner.weights import Ranks
from vllm_nanoquant.recipe import Recipe, ServingOptions

GEOMETRIES = Path(__file__).parents[2] / "benchmarks" / "geometry"
NANO_9B = GEOMETRIES / "nemotron-nano-9b-v2"
NANO_30B = GEOMETRIES / "nemotron-3-nano-30b-a3b"
OFF = PrefixCaching(False, 1)

# 128 heads of 80 x 128 in float32, and 12288 channels x 3 in bfloat16.
STATE_9B = 128 * 80 * 128 * 4 + 12288 * 3 * 2
TOKEN_9B = 2 * 8 * 128 * 2


def test_the_cache_of_the_9b_by_hand():
    cache = fit(read_facts(NANO_9B), Recipe(), Settings(24 * GIB, prefixes=OFF)).cache
    assert STATE_9B == 5_316_608
    # 81 blocks of 16 tokens are smaller than a state, 82 are larger.
    assert 81 * 16 * TOKEN_9B < STATE_9B < 82 * 16 * TOKEN_9B
    assert cache.block_tokens == 82 * 16
    assert cache.page_bytes == 82 * 16 * TOKEN_9B
    assert cache.block_bytes == 4 * cache.page_bytes  # 4 attention layers, 27 = 7 * 4 - 1 Mamba
    assert (cache.attention_groups, cache.mamba_groups) == (1, 7)
    assert cache.token_bytes == 4 * TOKEN_9B
    assert cache.state_bytes == 27 * STATE_9B
    assert cache.blocks_of(1) == cache.blocks_of(1312) == 8
    assert cache.blocks_of(1313) == 9
    assert cache.blocks_of(131072) == 107


def test_one_block_is_vllms_own():
    cache = fit(read_facts(NANO_9B), Recipe(), Settings(24 * GIB, prefixes=OFF)).cache
    assert cache.blocks_in(10 * cache.block_bytes) == 9
    assert cache.blocks_in(11 * cache.block_bytes - 1) == 9
    assert cache.blocks_in(0) == 0


@pytest.mark.parametrize(
    ("attention", "mamba", "group"), [(12, 17, 17), (17, 12, 17), (4, 6, 4), (4, 5, 5), (3, 3, 3)]
)
def test_layers_that_are_almost_as_many(attention, mamba, group):
    """Below half as many more, vLLM pads the rarer kind instead of splitting the other."""
    cache = cache_of(Attention(attention, 8, 8, 64), Mamba(mamba, 8, 64, 128, 1, 4), 1, 2, 4, OFF)
    assert cache.group_layers == group
    assert cache.attention_groups == -(-attention // group)
    assert cache.mamba_groups == -(-mamba // group)


@pytest.mark.parametrize(
    ("dtype", "state"), [("float32", 4), ("bfloat16", 2), ("float16", 2), ("auto", 4)]
)
def test_dtypes_of_the_state(dtype, state):
    settings = Settings(24 * GIB, mamba_ssm_cache_dtype=dtype, prefixes=OFF)
    cache = fit(read_facts(NANO_9B), Recipe(), settings).cache
    assert cache.state_bytes == 27 * (128 * 80 * 128 * state + 12288 * 3 * 2)


@pytest.mark.parametrize(
    ("release", "on", "states"),
    [
        ("0.26.0", None, 1),
        ("0.27.1", None, 1),
        ("0.28.0", None, 2),
        ("0.31.0", None, 2),
        ("0.32.0+cpu", None, 3),
        ("0.33.0", None, 3),
        (None, None, 3),
        ("dev", None, 3),
        ("0.26.0", True, None),
        ("0.33.0", False, 1),
    ],
)
def test_prefix_caching_by_release(release, on, states):
    assert caching_of(release, on).states == states


def test_a_state_for_every_block_is_dear():
    """As vLLM 0.26 caches prefixes: blocks end with chunks of 128, and each has 8 states' room."""
    every = caching_of("0.26.0", True)
    cache = fit(read_facts(NANO_9B), Recipe(), Settings(24 * GIB, prefixes=every)).cache
    assert cache.block_tokens == 11 * 128
    assert cache.blocks_of(131072) == 8 * 94


attentions = st.builds(
    Attention,
    layers=st.integers(1, 12),
    heads=st.just(8),
    kv_heads=st.sampled_from([1, 2, 8]),
    head_dim=st.sampled_from([32, 64, 128]),
)
mambas = st.builds(
    Mamba,
    layers=st.integers(1, 40),
    heads=st.sampled_from([8, 64, 128]),
    head_dim=st.sampled_from([16, 64, 80]),
    state=st.sampled_from([16, 128]),
    groups=st.sampled_from([1, 2, 8]),
    kernel=st.integers(2, 5),
)
cachings = st.sampled_from(
    [PrefixCaching(False, 1), PrefixCaching(True, 3), PrefixCaching(True, None)]
)


@given(
    st.none() | attentions,
    st.none() | mambas,
    cachings,
    st.integers(0, 4000),
    st.integers(1, 40),
    st.integers(1, 300_000),
)
def test_the_longest_is_the_longest(attention, mamba, prefixes, blocks, sequences, most):
    if attention is None and mamba is None:
        with pytest.raises(PlanError, match="without attention and Mamba layers"):
            cache_of(attention, mamba, 1, 2, 4, prefixes)
        return
    if attention is None and prefixes.states is None:
        return  # vLLM has no blocks of tokens then
    cache = cache_of(attention, mamba, 1, 2, 4, prefixes)
    longest = cache.longest(blocks, sequences, most)
    assert 0 <= longest <= most
    if longest:
        assert sequences * cache.blocks_of(longest) <= blocks
        assert cache.sequences(blocks, longest) >= sequences
    if longest < most:
        assert sequences * cache.blocks_of(longest + 1) > blocks


@given(st.none() | attentions, mambas)
def test_a_page_holds_a_state(attention, mamba):
    cache = cache_of(attention, mamba, 1, 2, 4, OFF)
    assert cache.page_bytes >= mamba.state_bytes(1, 4)
    if attention:
        token = attention.token_bytes(1, 2)
        assert cache.page_bytes == cache.block_tokens * token
        assert (cache.block_tokens - 16) * token < mamba.state_bytes(1, 4)
    assert cache.mamba_groups * cache.group_layers >= mamba.layers


@pytest.mark.parametrize("model", [NANO_9B, NANO_30B])
@pytest.mark.parametrize("gpu_memory", [22 * GIB, 24 * GIB, 24564 * MIB, 80 * GIB])
def test_what_is_suggested_fits(model, gpu_memory):
    limits = suggest_limits(model, Recipe(preset="full"), gpu_memory=gpu_memory)
    settings = Settings(gpu_memory, mamba_ssm_cache_dtype="float32")
    found = fit(read_facts(model), Recipe(preset="full"), settings)
    blocks = limits.max_num_seqs * found.cache.blocks_of(limits.max_model_len) + 1
    used = found.needs.total + blocks * found.cache.block_bytes
    assert used <= 0.9 * gpu_memory
    # And not much less would: one more block for each sequence is too much.
    if limits.max_model_len < found.model_len:
        assert used + limits.max_num_seqs * found.cache.block_bytes > 0.96 * settings.budget


def test_what_is_given_is_kept():
    given = {"max_model_len": 40_000, "max_num_seqs": 3, "gpu_memory_utilization": 0.85}
    assert suggest_limits(NANO_9B, Recipe(), gpu_memory=24 * GIB, **given) == Limits(**given)
    one = suggest_limits(NANO_9B, Recipe(), gpu_memory=24 * GIB, max_num_seqs=1)
    assert (one.max_model_len, one.max_num_seqs) == (131072, 1)
    long = suggest_limits(NANO_9B, Recipe(), gpu_memory=24 * GIB, max_model_len=131072)
    assert long.max_model_len == 131072
    assert 1 <= long.max_num_seqs < 8


def test_more_sequences_where_larger_batches_have_graphs():
    recipe = ServingOptions(max_capture_size=32)
    few = suggest_limits(NANO_9B, Recipe(), gpu_memory=140 * GIB)
    many = suggest_limits(NANO_9B, recipe, gpu_memory=140 * GIB)
    assert (few.max_num_seqs, many.max_num_seqs) == (8, 32)


def fits(model, recipe, **given):
    try:
        suggest_limits(model, recipe, **given)
    except PlanError:
        return False
    return True


@pytest.mark.parametrize(
    ("model", "given", "ways"),
    [
        (NANO_9B, {"gpu_memory": 9 * GIB}, ["--preset full", "--tensor-parallel-size 2"]),
        (NANO_30B, {"gpu_memory": 16 * GIB}, ["--tensor-parallel-size 2"]),
        (
            NANO_9B,
            {"gpu_memory": 12 * GIB, "max_num_seqs": 50, "max_model_len": 8192},
            ["--max-num-seqs"],
        ),
        (
            NANO_9B,
            {"gpu_memory": 12 * GIB, "max_num_seqs": 5, "max_model_len": 100_000},
            ["--max-num-seqs", "--max-model-len"],
        ),
    ],
)
def test_what_would_fit_does(model, given, ways):
    with pytest.raises(PlanError, match=r"does not fit: .* GiB more than the") as caught:
        suggest_limits(model, Recipe(), **given)
    text = str(caught.value)
    assert "\n" not in text
    offered = text.rpartition("what would fit: ")[2].split(", or ")
    assert [offer.rpartition(" ")[0] for offer in offered][: len(ways)] == [
        way if way.startswith("--max") else way.rpartition(" ")[0] for way in ways
    ]
    for offer in offered:
        change, recipe = dict(given), Recipe()
        option, _, value = offer.rpartition(" ")
        if option == "--preset":
            recipe = Recipe(preset=value)
        elif offer.startswith("GPUs of"):
            change["gpu_memory"] = int(float(offer.split()[2]) * GIB)
            smaller = change | {"gpu_memory": int(change["gpu_memory"] - 0.3 * GIB)}
            assert not fits(model, recipe, **smaller)
        else:
            change[option.removeprefix("--").replace("-", "_")] = int(value)
            if option.startswith("--max"):
                name = option.removeprefix("--").replace("-", "_")
                assert not fits(model, recipe, **(change | {name: int(value) + 1}))
        assert fits(model, recipe, **change), offer


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"gpu_memory": 0}, "gpu_memory is 0; it must be above 0"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size is 0"),
        ({"tensor_parallel_size": 3}, "tensor_parallel_size 3 does not divide 128 Mamba heads"),
        ({"tensor_parallel_size": 16}, "tensor_parallel_size 16 does not divide 8 Mamba groups"),
        ({"max_model_len": -1}, "max_model_len is -1"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"gpu_memory_utilization": 0.0}, "gpu_memory_utilization is 0.0"),
        ({"gpu_memory_utilization": 1.1}, "gpu_memory_utilization is 1.1"),
        ({"gpu_memory_utilization": float("nan")}, "gpu_memory_utilization is nan"),
        ({"kv_cache_dtype": "int3"}, "kv_cache_dtype is 'int3'; planned can be auto, bfloat16"),
        ({"mamba_ssm_cache_dtype": "fp8"}, "mamba_ssm_cache_dtype is 'fp8'; planned can be auto"),
    ],
)
def test_wrong_settings(given, text):
    with pytest.raises(UsageError, match=text.replace("(", r"\(")):
        suggest_limits(NANO_9B, Recipe(), **({"gpu_memory": 24 * GIB} | given))


@given(st.integers(1, 500 * GIB), st.floats(0.1, 1.0))
def test_memory_for_a_budget_has_that_budget(budget, share):
    memory = memory_for(budget, share)
    assert Settings(memory, gpu_memory_utilization=share).budget >= budget - 2
    assert Settings(max(1, memory - MIB), gpu_memory_utilization=share).budget < budget


def test_ranks_share_the_cache():
    one = fit(read_facts(NANO_9B), Recipe(), Settings(24 * GIB, prefixes=OFF)).cache
    two = fit(read_facts(NANO_9B), Recipe(), Settings(24 * GIB, Ranks(2), prefixes=OFF)).cache
    assert (two.block_tokens, two.block_bytes * 2) == (one.block_tokens, one.block_bytes)
    sixteen = Attention(4, 32, 2, 128)
    assert sixteen.token_bytes(16, 2) == 2 * 1 * 128 * 2  # a head is on several ranks
